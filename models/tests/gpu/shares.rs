//! A worker whose steps have all of a GPU or a part of it, as each step is told: the tokens are the CPU's, what moves
//! waits for what it left behind, also ahead of the host, and a wait that is forgotten is found.

use std::collections::HashMap;

use kvern_kernels::{BesideOptions, DeviceSampler, DeviceShare, KernelError, SampleRow};
use kvern_models::ForwardBatch;

use super::*;

const VOCAB: usize = 128;
const PROMPT: usize = 20;
const STEPS: usize = 24;

/// A worker beside another one, on a GPU of ten multiprocessors of which it has four to itself.
struct Beside {
    rig: Rig,
    sampler: DeviceSampler,
    table: Vec<u32>,
    /// The worker's streams, by share, as the log calls them.
    streams: [String; 2],
}

impl Beside {
    fn new(shim: Options) -> Beside {
        let (driver, device) = device_with_part(shim, Element::F32);
        let made = |end: &str| {
            let log = driver.log();
            let line = log.iter().rev().find_map(|line| line.strip_prefix("stream ")?.strip_suffix(end));
            line.unwrap_or_else(|| panic!("no stream{end} in {log:?}")).to_owned()
        };
        let streams = [" High", " High on p0 of 4 multiprocessors"].map(made);
        let options = f32_options(72, 4);
        let mut rig = Rig::on(device, Some(driver), &llama(), &options, KvDType::F32);
        rig.capture();
        let tokens = rig.loaded.model.sampled_tokens();
        let sampler = DeviceSampler::new(&rig.device, tokens, 4, VOCAB, 0).unwrap().unwrap();
        Beside { sampler, table: scattered(7, blocks_of(72), BLOCKS), streams, rig }
    }

    /// Puts a step on the device that goes on with what the last one sampled, or begins with a prompt.
    fn launch(&mut self, prompt: &[u32], step: usize, share: DeviceShare) -> Result<(), KernelError> {
        let Beside { rig, sampler, table, .. } = self;
        rig.device.move_to(share)?;
        let start = if step == 0 { 0 } else { PROMPT + step - 1 };
        let ids = if step == 0 { prompt } else { &[0] };
        let end = (start + ids.len()) as u32;
        sampler.begin();
        sampler.push(SampleRow::greedy(end), [].into_iter(), None, [].into_iter())?;
        sampler.upload()?;
        let positions: Vec<u32> = (start as u32..end).collect();
        let slot = |at: &u32| table[*at as usize / BLOCK_SIZE] * BLOCK_SIZE as u32 + at % BLOCK_SIZE as u32;
        let batch = ForwardBatch {
            input_ids: ids,
            positions: &positions,
            slot_mapping: &positions.iter().map(slot).collect::<Vec<_>>(),
            cu_seqlens_q: &[0, ids.len() as u32],
            context_lens: &[end],
            block_tables: table,
            block_table_stride: table.len(),
            sample_rows: &[ids.len() as u32 - 1],
            last_sampled: if step == 0 { &[] } else { &[0] },
        };
        let logits = rig.loaded.model.forward(&batch, &mut rig.kv)?;
        sampler.launch(&rig.device, logits)
    }

    /// Greedy tokens after a prompt, each step launched before the one before it has ended.
    fn ahead(&mut self, prompt: &[u32], share: impl Fn(usize) -> DeviceShare) -> Result<Vec<u32>, KernelError> {
        let mut tokens = Vec::new();
        self.launch(prompt, 0, share(0))?;
        for step in 1..=STEPS {
            if step < STEPS {
                self.launch(prompt, step, share(step))?;
            }
            tokens.extend(self.sampler.finish()?[0].token);
        }
        Ok(tokens)
    }

    fn driver(&self) -> &ShimDriver {
        self.rig.driver.as_ref().unwrap()
    }
}

fn device_with_part(shim: Options, element: Element) -> (Arc<ShimDriver>, Device) {
    let driver = ShimDriver::new(Options { multiprocessors: 10, ..shim });
    let gpu = Device::gpu(Arc::clone(&driver) as _, element).unwrap();
    let [part, _] = gpu.divide(4).unwrap();
    let device = gpu.beside(BesideOptions { threads: 1, is_urgent: true, part: Some(part) }).unwrap();
    (driver, device)
}

fn llama() -> ModelFiles {
    ModelFiles::open(&folder().join("checkpoints/llama.gguf")).unwrap()
}

fn prompt() -> Vec<u32> {
    (0..PROMPT as u32).map(|at| (at * 37 + 5) % VOCAB as u32).collect()
}

/// Changes at every step, and after some.
fn changing(step: usize) -> DeviceShare {
    if step % 5 % 2 == 1 { DeviceShare::Part } else { DeviceShare::Whole }
}

#[test]
fn steps_that_change_their_share_ahead_of_the_host_say_what_the_cpu_says() {
    let prompt = prompt();
    let table = scattered(7, blocks_of(72), BLOCKS);
    let expected = Rig::cpu(&llama(), &f32_options(72, 4)).greedy(&prompt, STEPS, &table);
    for (seed, lazy) in [(0, false), (1, true), (2, true)] {
        let mut worker = Beside::new(Options { seed, lazy, ..Options::default() });
        worker.driver().clear_log();
        for share in [changing, |_| DeviceShare::Part, |_| DeviceShare::Whole] {
            assert_eq!(worker.ahead(&prompt, share).unwrap(), expected, "seed {seed}");
        }
        let log = worker.driver().log();
        // Each graph on one stream, on both some.
        let mut graphs: HashMap<&str, &str> = HashMap::new();
        for line in log.iter().filter(|line| line.starts_with("graph ")) {
            let words: Vec<&str> = line.split(' ').collect();
            assert_eq!(*graphs.entry(words[1]).or_insert(words[2]), words[2], "{line}");
        }
        assert!(worker.streams.iter().all(|stream| graphs.values().any(|found| found == stream)), "{graphs:?}");
        let allocations: Vec<_> = log.iter().filter(|line| line.starts_with("allocate")).collect();
        assert!(allocations.is_empty(), "nothing allocates after the start: {allocations:?}");
        assert!(worker.rig.finish() >= 3 * (STEPS - 1));
    }
}

/// In 16 bits decode attention is cut for the multiprocessors of the share; that cannot be seen in what comes of it.
#[test]
fn every_share_gives_the_same_bits() {
    let (_folder, files, options) = dummy(&config("llama", None));
    let expected = conversation(&mut Rig::gpu(&files, Element::BF16, &options, Options::default()));
    let (driver, device) = device_with_part(Options::default(), Element::BF16);
    let mut rig = Rig::on(device, Some(driver), &files, &options, KvDType::BF16);
    for is_captured in [false, true] {
        if is_captured {
            rig.capture();
        }
        for share in [DeviceShare::Part, DeviceShare::Whole] {
            rig.device.move_to(share).unwrap();
            assert!(conversation(&mut rig) == expected, "{share:?}, captured: {is_captured}");
        }
    }
    assert!(rig.finish() >= 12);
}

/// The first thing on the other stream is the wait, and all of the step comes there.
#[test]
fn what_moves_waits_for_what_it_left_behind() {
    let mut worker = Beside::new(Options::default());
    let [whole, part] = worker.streams.clone();
    worker.launch(&prompt(), 0, DeviceShare::Whole).unwrap();
    let stream_of = |line: &String| line.split(' ').find(|word| [&*whole, &*part].contains(word)).map(str::to_owned);
    for (step, (from, to)) in [(1, (&whole, &part)), (2, (&part, &whole)), (3, (&whole, &whole))] {
        worker.driver().clear_log();
        worker.launch(&prompt(), step, if to == &part { DeviceShare::Part } else { DeviceShare::Whole }).unwrap();
        worker.sampler.finish().unwrap();
        let log = worker.driver().log();
        let mut on_streams = log.iter().filter(|line| stream_of(line).is_some());
        if from != to {
            let (record, wait) = (on_streams.next().unwrap(), on_streams.next().unwrap());
            let event = record.split(' ').nth(1).unwrap();
            assert_eq!((record, wait), (&format!("record {event} {from}"), &format!("wait {event} {to}")), "{log:?}");
        }
        for line in on_streams {
            assert_eq!(stream_of(line).as_ref(), Some(to), "step {step}: {line}");
            assert!(!line.starts_with("wait "), "step {step}: {line}");
        }
        let count = |call: &str| log.iter().filter(|line| line.starts_with(call)).count();
        // All that a short step needs is brought at once, and its tokens come back.
        assert_eq!(["copy_to_device ", "graph ", "copy_to_host "].map(count), [1; 3], "step {step}: {log:?}");
    }
    worker.sampler.finish().unwrap();
    assert_eq!(worker.driver().refusals(), Vec::<String>::new());
}

#[test]
fn a_wait_that_is_forgotten_is_found() {
    for (moves, lazy) in [(1, false), (2, false), (3, true)] {
        let mut worker = Beside::new(Options { lazy, ..Options::default() });
        worker.rig.device.move_to(DeviceShare::Whole).unwrap();
        worker.driver().leave_out_wait(moves);
        let text = worker.ahead(&prompt(), changing).unwrap_err().to_string();
        assert!(text.contains("expected to be") && text.contains(" after "), "{text}");
        assert!(!worker.driver().refusals().is_empty());
        // Neither stream knows of all that is on the other one: each is waited for by itself.
        for share in [DeviceShare::Part, DeviceShare::Whole] {
            worker.rig.device.move_to(share).unwrap();
            worker.rig.device.synchronize().unwrap();
        }
    }
}

#[test]
fn who_has_no_part_has_the_whole() {
    let driver = ShimDriver::new(Options::default());
    let gpu = Device::gpu(Arc::clone(&driver) as _, Element::F32).unwrap();
    let second = gpu.beside(BesideOptions { threads: 1, is_urgent: false, part: None }).unwrap();
    let cpu = Device::cpu(cpu_options()).unwrap();
    driver.clear_log();
    for (device, found) in [(&gpu, "a GPU without"), (&second, "a GPU without"), (&cpu, "cpu")] {
        assert_eq!(device.shares(), [DeviceShare::Whole]);
        device.move_to(DeviceShare::Whole).unwrap();
        let text = device.move_to(DeviceShare::Part).unwrap_err().to_string();
        assert!(text.starts_with(&format!("expected a device with a part for its worker, found {found}")), "{text}");
    }
    assert_eq!(driver.log(), Vec::<String>::new());
}
