//! Closed and open loops. In a closed loop a request follows an answer; in an open one requests come when they come.

use crate::answer::Answer;
use crate::client::{Asked, Client};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Keeps `flight` requests in flight until `make` has no more or the client leaves. Must run within a `LocalSet`.
pub(crate) async fn closed_loop(
    client: &Rc<Client>,
    flight: usize,
    mut make: impl FnMut() -> Option<Asked>,
) -> Vec<Answer> {
    let mut answers = Vec::new();
    let mut running = JoinSet::new();
    loop {
        while running.len() < flight && !client.is_leaving() {
            let Some(asked) = make() else { break };
            let client = Rc::clone(client);
            running.spawn_local(async move { client.ask(&asked).await });
        }
        match running.join_next().await {
            Some(answer) => answers.push(answer.expect("a request's task does not panic")),
            None => return answers,
        }
    }
}

/// Begins a task at each of `times`, in seconds from now, and waits for all. Must run within a `LocalSet`.
pub(crate) async fn open_loop<T: 'static, F: Future<Output = T> + 'static>(
    times: &[f64],
    mut begin: impl FnMut(usize) -> F,
) -> Vec<T> {
    let began = Instant::now();
    let mut running = JoinSet::new();
    for (number, &at) in times.iter().enumerate() {
        tokio::time::sleep_until(began + Duration::from_secs_f64(at)).await;
        running.spawn_local(begin(number));
    }
    let mut done = Vec::with_capacity(times.len());
    while let Some(one) = running.join_next().await {
        done.push(one.expect("a request's task does not panic"));
    }
    done
}

/// Runs `load` until `seconds` have passed, then has `client` leave; what `load` returned.
pub(crate) async fn for_seconds<T>(client: &Client, seconds: f64, load: impl Future<Output = T>) -> T {
    let end = async {
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        client.leave_all();
    };
    tokio::join!(load, end).0
}
