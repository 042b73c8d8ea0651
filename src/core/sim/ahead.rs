//! Steps that are planned ahead, on workers with a queue of two: what must be true of them, and of what comes of them when the
//! step before fails.

use super::device::Step;
use super::run::Run;
use super::shares::Others;
use super::watch::Before;
use super::{Failure, check};
use crate::{Effect, Engine, Input, Sampled, StepPlan, WorkerId};

impl Run {
    pub(super) fn plan_ahead(&mut self, worker: WorkerId) -> Result<(), Failure> {
        let engine = self.engine.clone();
        let before = Before::new(&engine, worker);
        let mut plan = StepPlan::empty();
        let is_planned = self.engine.plan_ahead(worker, &mut plan);
        check(is_planned != plan.slices.is_empty(), "plan", || format!("{is_planned} with {plan:?}"))?;
        if let Some(log) = &mut self.log {
            log.plan_ahead(worker, is_planned, &plan);
            log.effects(&[]);
        }
        if !is_planned {
            let (stats, found) = (engine.stats(), self.engine.stats());
            return check(stats == found, "step ahead", || format!("none, yet {stats:?} became {found:?}"));
        }
        self.check_share(&plan, &Others::new(&engine, worker))?;
        self.check_step_ahead(engine, &plan)?;
        before.check_evictions(&self.engine, worker, &[])?;
        self.coverage.steps_ahead += 1;
        self.coverage.blocks_ahead += plan.blocks.len() as u64;
        let tables = &mut self.tables[usize::from(worker.0)];
        tables.take(&plan)?;
        let tables = tables.of_plan(&plan);
        self.in_flight.push(Step { plan, tables });
        Ok(())
    }

    /// One step ahead of one in flight, with all that go on and nobody else, when nobody else could start.
    fn check_step_ahead(&self, engine: Engine, plan: &StepPlan) -> Result<(), Failure> {
        let ensure = |holds, words: &str| check(holds, "step ahead", || format!("{words}: {plan:?}"));
        let mut others = self.in_flight.iter().filter(|step| step.plan.worker == plan.worker);
        let before = others.next().map(|step| &step.plan);
        let Some(before) = before.filter(|before| before.step < plan.step) else {
            return Err(Failure::new("step ahead", format!("of nothing: {plan:?}")));
        };
        let is_whole = self.failed[usize::from(plan.worker.0)].is_none();
        ensure(others.next().is_none() && is_whole, "of more than a step")?;
        ensure(before.slices.iter().all(|slice| slice.sample), "of a prompt that goes on")?;
        let goes_on = before.slices.iter().map(|slice| slice.request).filter(|request| {
            let client = &self.clients[request.0 as usize];
            !client.is_finished && client.emitted + 1 < client.submission.max_new_tokens
        });
        let found: Vec<_> = plan.slices.iter().map(|slice| slice.request).collect();
        ensure(found == goes_on.collect::<Vec<_>>(), "of others")?;
        for slice in &plan.slices {
            let client = &self.clients[slice.request.0 as usize];
            let fits = slice.last_sampled && slice.sample && slice.tokens.len() == 1;
            ensure(fits && !client.submission.needs_tokens && !client.is_ending(), "of what is not foreseen")?;
        }
        let is_started = would_start(engine, plan.worker);
        ensure(!is_started, "although somebody could start")
    }

    /// Executes and reports the step behind one that failed: it ran on rubbish, and nothing may come of it.
    pub(super) fn complete_behind(&mut self, step: &Step, failed: &StepPlan) -> Result<(), Failure> {
        let Step { plan, tables } = step;
        let pool = self.pool(plan.worker);
        self.devices[pool].fail(plan, tables)?;
        if self.workload.ahead.percent(50) {
            let kept = &mut self.tables[usize::from(plan.worker.0)];
            failed.slices.iter().for_each(|slice| kept.forget(slice.request));
        }
        self.coverage.dropped_ahead += 1;
        if let [slice] = &failed.slices[..] {
            self.blame(slice.request);
        }
        let (worker, step) = (plan.worker, plan.step);
        if self.workload.ahead.percent(30) {
            return self.apply(Input::StepFailed { worker, step });
        }
        let mut sampled = self.engine.recycle_sampled();
        for slice in &plan.slices {
            let token = self.workload.ahead.below(super::workload::VOCABULARY);
            let fails = self.workload.ahead.percent(10);
            sampled.push((slice.request, if fails { Sampled::Failed } else { Sampled::Token(token) }));
        }
        self.apply(Input::StepDone { worker, step, device_us: 1_000, sampled })
    }
}

/// Whether a plan would start somebody if the worker had just become idle.
fn would_start(mut engine: Engine, worker: WorkerId) -> bool {
    let state = &mut engine.workers[usize::from(worker.0)];
    let planned = std::mem::take(&mut state.planned);
    state.step = None;
    for slice in planned {
        let request = &mut engine.requests[slice.index];
        request.in_flight = false;
        // Of a prompt, too, one token is left, as of a decode.
        request.num_computed += slice.num_tokens - 1;
    }
    let mut effects = Vec::new();
    engine.plan(worker, &mut StepPlan::empty(), &mut effects);
    effects.iter().any(|effect| matches!(effect, Effect::Scheduled { .. }))
}
