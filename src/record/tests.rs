#![allow(clippy::unwrap_used)]

use super::*;
use kvern_core::record::{Entry, Recording};
use kvern_core::replay::Replay;
use kvern_core::{CacheSalt, ClassId, Engine, RequestId, Sampled, Submission, TenantId};
use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// A core and its recorder, driven as the engine thread does.
struct Driver {
    engine: Engine,
    recorder: Recorder,
    plan: StepPlan,
    effects: Vec<Effect>,
    now: u64,
    next: u64,
    finished: u64,
}

fn config() -> CoreConfig {
    CoreConfig { step_tokens_max: 64, running_max: 8, request_tokens_max: 4096, ..CoreConfig::mixed(26, 16) }
}

fn options(path: &Path) -> RecordConfig {
    RecordConfig { path: path.to_owned(), bytes_max: 1 << 30, prompts: false }
}

impl Driver {
    fn new(options: &RecordConfig) -> Self {
        let recorder = Recorder::start(options, &config()).unwrap();
        let engine = Engine::new(config());
        Driver { engine, recorder, plan: StepPlan::empty(), effects: Vec::new(), now: 0, next: 0, finished: 0 }
    }

    fn apply(&mut self, input: Input) {
        self.now += 1_000;
        let input = Timed { at: Micros(self.now), input };
        self.recorder.input(&input);
        self.engine.apply(input, &mut self.effects);
        self.told();
    }

    fn told(&mut self) {
        self.recorder.effects(&self.effects);
        self.finished += self.effects.iter().filter(|effect| matches!(effect, Effect::Finish { .. })).count() as u64;
        self.effects.clear();
    }

    fn submit(&mut self, prompt: Vec<u32>) {
        let request = RequestId(self.next);
        self.next += 1;
        self.apply(Input::Submit(Submission {
            request,
            prompt,
            max_new_tokens: 40,
            min_new_tokens: 2,
            needs_tokens: false,
            stop_tokens: vec![STOP],
            salt: CacheSalt(u128::from(request.0 % 2)),
            shared_tokens: 0,
            tenant: TenantId(0),
            class: ClassId(0),
            deadline: None,
        }));
    }

    /// A step, if there is something to run.
    fn step(&mut self) {
        let worker = WorkerId(0);
        let is_planned = self.engine.plan(worker, &mut self.plan, &mut self.effects);
        self.recorder.planned(worker, &self.plan, is_planned);
        self.told();
        if !is_planned {
            return;
        }
        let samples = self.plan.slices.iter().filter(|slice| slice.sample);
        let token = |request: RequestId, start: u32| {
            if (request.0 + u64::from(start)).is_multiple_of(70) { STOP } else { 500_000 + start }
        };
        let sampled = samples.map(|slice| (slice.request, Sampled::Token(token(slice.request, slice.start)))).collect();
        self.apply(Input::StepDone { worker, step: self.plan.step, device_us: 900, sampled });
    }

    /// Requests that share prefixes, with cancels and preemptions.
    fn run(&mut self, num_requests: u64) {
        for number in 0..num_requests {
            self.submit((0..40 + number as u32 % 50).map(|at| FIRST + at * (1 + number as u32 % 3)).collect());
            self.step();
            if number % 7 == 3 {
                let (request, reason) = (RequestId(number - 1), kvern_core::CancelReason::ClientGone);
                self.apply(Input::Cancel { request, reason });
            }
        }
        while !self.engine.is_idle() {
            self.step();
        }
        assert_eq!(self.finished, num_requests);
        let stats = self.engine.stats();
        assert!(stats.preemptions > 0 && stats.prefix_hits > 0, "{stats:?}");
    }
}

const FIRST: u32 = 1_000_000;
const STOP: u32 = 777;

/// All entries of a recording, which must be whole, replayed without a difference.
fn entries(path: &Path) -> Vec<Entry> {
    let bytes = fs::read(path).unwrap();
    let recording = Recording::open(&bytes).unwrap();
    assert_eq!(recording.config(), &config());
    let entries: Vec<Entry> = recording.map(Result::unwrap).collect();
    let mut replay = Replay::new(config()).unwrap();
    for entry in &entries {
        replay.take(entry.clone()).unwrap();
    }
    assert_eq!(replay.replayed().compared * 2, entries.len() as u64);
    entries
}

fn tokens(entries: &[Entry]) -> HashSet<u32> {
    let mut tokens = HashSet::new();
    for entry in entries {
        match entry {
            Entry::Input(Timed { input: Input::Submit(submission), .. }) => {
                tokens.extend(submission.prompt.iter().chain(&submission.stop_tokens));
            }
            Entry::Input(Timed { input: Input::StepDone { sampled, .. }, .. }) => {
                tokens.extend(sampled.iter().filter_map(|(_, sampled)| match sampled {
                    Sampled::Token(token) => Some(*token),
                    Sampled::Failed => None,
                }));
            }
            _ => {}
        }
    }
    tokens
}

#[test]
fn records_with_pseudonyms_or_with_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let is_real = |token: &u32| *token == STOP || (500_000..2_000_000).contains(token);
    let mut first = None;
    for prompts in [false, true, false] {
        let mut driver = Driver::new(&RecordConfig { prompts, ..options(&path) });
        driver.run(60);
        assert!(driver.recorder.is_recording());
        drop(driver);
        let tokens = tokens(&entries(&path));
        let num_real = tokens.iter().filter(|token| is_real(token)).count();
        if prompts {
            assert_eq!(num_real, tokens.len());
            assert!(tokens.contains(&STOP) && tokens.contains(&FIRST));
            continue;
        }
        // By chance 31 bits hit a range of 1.5 million now and then.
        assert!(tokens.len() > 1_000 && num_real * 100 < tokens.len(), "{num_real} of {}", tokens.len());
        let first = first.get_or_insert_with(|| tokens.clone());
        let common = first.intersection(&tokens).count();
        assert!(
            common == tokens.len() && tokens == *first || common * 100 < tokens.len(),
            "each recording has its key"
        );
    }
}

#[test]
fn earlier_recordings_are_moved_aside() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.rec");
    for run in 1..=5 {
        let mut driver = Driver::new(&options(&path));
        (0..run).for_each(|_| driver.submit(vec![1; 20]));
        drop(driver);
    }
    let mut names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["run.rec", "run.rec.1", "run.rec.2", "run.rec.3"]);
    for (name, run) in names.iter().zip([5, 4, 3, 2]) {
        assert_eq!(entries(&folder.path().join(name)).len(), 2 * run, "{name:?}");
    }
}

#[test]
fn a_recording_ends_at_its_limit_and_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let (mut sizes, mut counts) = (Vec::new(), Vec::new());
    for bytes_max in [2_000, 20_000, 1 << 30] {
        let mut driver = Driver::new(&RecordConfig { bytes_max, ..options(&path) });
        driver.run(60);
        assert_eq!(driver.recorder.is_recording(), bytes_max == 1 << 30);
        drop(driver);
        let size = fs::metadata(&path).unwrap().len();
        assert!(size <= bytes_max, "{size}");
        sizes.push(size);
        counts.push(entries(&path).len());
    }
    assert!(
        sizes[0] > 1_000 && sizes[1] > 19_000 && counts[0] < counts[1] && counts[1] < counts[2],
        "{sizes:?} {counts:?}"
    );
}

#[test]
fn a_file_that_cannot_be_made_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing").join("run");
    assert!(Recorder::start(&options(&path), &config()).is_err());
}
