//! The bodies of the threads that work for the engine and report to its inbox.

use super::handle::Message;
use crate::worker::{Mover, StepCommand, Transfer, Worker};
use kvern_core::WorkerId;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, SyncSender};

/// A worker: serves steps until the engine hangs up, and says so if it ends before. `killed` is for tests: the worker is then
/// gone with the step that it is at.
pub(crate) fn serve_worker(
    id: WorkerId,
    worker: Worker,
    commands: &Receiver<StepCommand>,
    killed: &AtomicBool,
    inbox: &SyncSender<Message>,
) {
    // Told however the thread ends. The engine is gone only when the process ends.
    struct Farewell<'a>(WorkerId, &'a SyncSender<Message>);
    impl Drop for Farewell<'_> {
        fn drop(&mut self) {
            let _ = self.1.send(Message::WorkerLost(self.0));
        }
    }
    let _farewell = Farewell(id, inbox);
    worker.run(commands, killed, |result| {
        let _ = inbox.send(Message::StepDone(Box::new(result)));
    });
}

/// Moves blocks between pools until the engine hangs up.
pub(crate) fn serve_mover(mut mover: Mover, transfers: &Receiver<Transfer>, inbox: &SyncSender<Message>) {
    while let Ok(transfer) = transfers.recv() {
        let id = transfer.transfer;
        let outcome = mover.run(&transfer).map_err(|error| error.to_string());
        if inbox.send(Message::Transferred(id, outcome)).is_err() {
            return;
        }
    }
}
