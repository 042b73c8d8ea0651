//! What of its device each step has, where a prefill and a decode worker have a part each.

use kvern_core::{
    CacheSalt, ClassId, CoreConfig, DeviceShare, Engine, Input, Micros, PoolId, Probe, RequestId, Role, Sampled,
    StepPlan, Submission, TenantId, Timed, WorkerId, WorkerSpec,
};

const PREFILL: WorkerId = WorkerId(0);
const DECODE: WorkerId = WorkerId(1);

struct Server(Engine);

impl Server {
    fn new(device_parts: bool) -> Self {
        let worker = |role| WorkerSpec { role, pool: PoolId(0) };
        Server(Engine::new(CoreConfig {
            workers: vec![worker(Role::Prefill), worker(Role::Decode)],
            plan_ahead: true,
            ride_along_tokens_max: 0,
            device_parts,
            ..CoreConfig::mixed(40, 4)
        }))
    }

    fn apply(&mut self, input: Input) {
        self.0.apply(Timed { at: Micros(0), input }, &mut Vec::new());
        assert_eq!(self.0.check(), Ok(()));
    }

    fn submit(&mut self, request: u64) {
        self.apply(Input::Submit(Submission {
            request: RequestId(request),
            prompt: vec![request as u32; 6],
            max_new_tokens: 10,
            min_new_tokens: 0,
            needs_tokens: false,
            stop_tokens: Vec::new(),
            salt: CacheSalt(0),
            shared_tokens: 0,
            tenant: TenantId(0),
            class: ClassId(0),
            deadline: None,
        }));
    }

    fn plan(&mut self, worker: WorkerId) -> StepPlan {
        let mut plan = StepPlan::empty();
        assert!(self.0.plan(worker, &mut plan, &mut Vec::new()), "{worker:?} has requests");
        plan
    }

    fn ahead(&mut self) -> StepPlan {
        let mut plan = StepPlan::empty();
        assert!(self.0.plan_ahead(DECODE, &mut plan), "all go on");
        plan
    }

    fn done(&mut self, plan: &StepPlan, device_us: u64) {
        let sampling = plan.slices.iter().filter(|slice| slice.sample);
        let sampled = sampling.map(|slice| (slice.request, Sampled::Token(50))).collect();
        self.apply(Input::StepDone { worker: plan.worker, step: plan.step, device_us, sampled });
    }
}

/// The shares of a prompt alone, its decodes alone, a second prompt beside them, a decode that was planned ahead before
/// that came and one after, and of decodes alone again.
fn shares(device_parts: bool) -> Vec<DeviceShare> {
    let mut server = Server::new(device_parts);
    server.submit(1);
    let first = server.plan(PREFILL);
    server.done(&first, 0);
    let decode = server.plan(DECODE);
    let ahead = server.ahead();
    server.submit(2);
    let second = server.plan(PREFILL);
    server.done(&decode, 0);
    let after = server.ahead();
    server.done(&second, 0);
    server.done(&ahead, 0);
    server.done(&after, 0);
    let alone = server.plan(DECODE);
    assert_eq!(alone.slices.len(), 2, "the second is handed over");
    [first, decode, ahead, second, after, alone].map(|plan| plan.share).to_vec()
}

#[test]
fn a_step_has_its_part_while_others_are_at_work() {
    use DeviceShare::{Part, Whole};
    assert_eq!(shares(true), [Whole, Whole, Whole, Part, Part, Whole]);
    assert_eq!(shares(false), [Whole; 6]);
}

/// Requests that run count although no step of theirs is in flight, and those of a lost worker do not.
#[test]
fn who_runs_between_two_steps_is_at_work() {
    let mut server = Server::new(true);
    server.submit(1);
    let first = server.plan(PREFILL);
    server.done(&first, 0);
    server.submit(2);
    assert_eq!(server.plan(PREFILL).share, DeviceShare::Part, "the first request decodes");
    assert_eq!(server.plan(DECODE).share, DeviceShare::Part);
    server.apply(Input::WorkerLost { worker: DECODE });
    server.apply(Input::WorkerBack { worker: DECODE });
    server.apply(Input::WorkerLost { worker: PREFILL });
    assert_eq!(server.plan(DECODE).share, DeviceShare::Whole);
}

/// Predictions are of steps beside others: one that had the whole says nothing of them, unless it has nobody to be
/// beside.
#[test]
fn steps_on_the_whole_teach_who_is_alone_only() {
    const SLOW_US: u64 = 1_000_000;
    let probe = Probe { uncached_tokens: 100, ..Probe::default() };
    let learns = |device_parts: bool, is_lost: bool| {
        let mut server = Server::new(device_parts);
        if is_lost {
            server.apply(Input::WorkerLost { worker: DECODE });
        }
        server.submit(1);
        let plan = server.plan(PREFILL);
        let mut other = Server(server.0.clone());
        server.done(&plan, 0);
        other.done(&plan, SLOW_US);
        other.0.predict_ttft(&probe) != server.0.predict_ttft(&probe)
    };
    assert_eq!([learns(false, false), learns(true, false), learns(true, true)], [true, false, true]);
}
