//! A run that was recorded repeats itself: the same effects and the same plans, from nothing but the recording's bytes.

use super::run::Run;
use crate::record::{Entry, Recording, write_header, write_input, write_plan};
use crate::{CoreConfig, Effect, Engine, Input, StepPlan, Timed, WorkerId};

/// All that went into a core, as bytes, and all that came out.
#[derive(Debug)]
pub(crate) struct Log {
    recording: Vec<u8>,
    effects: Vec<Effect>,
    plans: Vec<StepPlan>,
}

impl Log {
    fn new(config: &CoreConfig) -> Self {
        let mut recording = Vec::new();
        write_header(config, &mut recording);
        Log { recording, effects: Vec::new(), plans: Vec::new() }
    }

    pub(crate) fn input(&mut self, input: &Timed<Input>) {
        write_input(input, &mut self.recording);
    }

    /// A call of `plan`: one that gave no step may have moved requests and is recorded, too.
    pub(crate) fn plan(&mut self, worker: WorkerId, is_planned: bool, plan: &StepPlan) {
        write_plan(worker, &mut self.recording);
        if is_planned {
            self.plans.push(plan.clone());
        }
    }

    pub(crate) fn effects(&mut self, effects: &[Effect]) {
        self.effects.extend_from_slice(effects);
    }
}

/// Does again what the recording says.
fn replay(recording: &[u8]) -> (Vec<Effect>, Vec<StepPlan>) {
    let recording = Recording::open(recording).expect("the header was written by us");
    let mut engine = Engine::new(recording.config().clone());
    let (mut effects, mut plans) = (Vec::new(), Vec::new());
    for entry in recording {
        match entry.expect("the entry was written by us") {
            Entry::Input(input) => engine.apply(input, &mut effects),
            Entry::Plan(worker) => {
                let mut plan = StepPlan::empty();
                if engine.plan(worker, &mut plan, &mut effects) {
                    plans.push(plan);
                }
            }
        }
    }
    assert!(engine.is_idle(), "the recorded run ended");
    (effects, plans)
}

#[test]
fn recorded_runs_repeat_themselves() {
    let mut num_plans = 0;
    for seed in 0..200 {
        let mut run = Run::new(seed, None);
        run.log = Some(Log::new(run.config()));
        let outcome = run.drive();
        assert!(outcome.is_ok(), "seed {seed}: {outcome:?}");
        let log = run.log.expect("set above");
        num_plans += log.plans.len();
        let (effects, plans) = replay(&log.recording);
        assert_eq!(effects, log.effects, "seed {seed}");
        assert_eq!(plans, log.plans, "seed {seed}");
    }
    assert!(num_plans > 1_000, "the runs planned only {num_plans} steps");
}
