#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;

/// Every task once, whatever the number of threads and tasks.
#[test]
fn each_task_runs_once() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads).unwrap();
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|worker, task| {
                assert!(worker < threads);
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
        }
    }
}

/// Jobs follow each other closely: a worker late for one must never run the next one's tasks with the old work.
#[test]
fn jobs_do_not_mix() {
    let pool = Pool::new(4).unwrap();
    for job in 0..20_000 {
        let (tasks, sum) = (1 + job % 9, AtomicUsize::new(0));
        pool.run(tasks, &|_, task| {
            sum.fetch_add(job + task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), tasks * job + tasks * (tasks - 1) / 2);
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    for threads in [1, 3] {
        let pool = Pool::new(threads).unwrap();
        for bad in [0, 5, 63] {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|_, task| assert!(task != bad, "task {task}"));
            }));
            assert_eq!(caught.unwrap_err().downcast_ref::<String>().unwrap(), &format!("task {bad}"));
        }
        let ran = AtomicUsize::new(0);
        pool.run(10, &|_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 10);
    }
}

#[test]
fn a_nested_call_is_refused() {
    let pool = Pool::new(2).unwrap();
    let caught = catch_unwind(AssertUnwindSafe(|| pool.run(4, &|_, _| pool.run(4, &|_, _| ()))));
    assert!(caught.is_err());
    pool.run(4, &|_, _| ());
}

#[test]
fn numbers_of_threads_out_of_range_are_refused() {
    assert!(Pool::new(0).is_err());
    assert!(Pool::new(THREADS_MAX + 1).is_err());
}

/// After a job the workers go to sleep: the process then uses almost no CPU time.
#[test]
fn an_idle_pool_sleeps() {
    let pool = Pool::new(4).unwrap();
    pool.run(64, &|_, _| ());
    let deadline = Instant::now() + Duration::from_secs(20);
    while !pool.shared.sleeping[1..].iter().all(|sleeping| sleeping.load(Ordering::SeqCst)) {
        assert!(Instant::now() < deadline, "workers still spin");
        thread::yield_now();
    }
    // Sleepers are woken by the next job, or at least not waited for.
    let ran = AtomicUsize::new(0);
    pool.run(64, &|_, _| {
        ran.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(ran.into_inner(), 64);
}

#[test]
fn shares_cover_all_tasks() {
    for tasks in [0, 1, 5, 100, usize::MAX] {
        assert_eq!(share(tasks, 0, 7), 0);
        assert_eq!(share(tasks, 7, 7), tasks);
        assert!((0..7).all(|worker| share(tasks, worker, 7) <= share(tasks, worker + 1, 7)));
    }
}
