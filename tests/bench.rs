//! `kvern bench`, run as a program on the default model: what it prints is what was asked for.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use std::process::Command;

/// Standard output of a short run with `args`.
fn bench(args: &[&str]) -> String {
    let model = support::model_path();
    let short = [
        "--rounds=2",
        "--steps=2",
        "--prefill=24",
        "--decode=1x20,3x5",
        "--attention=1x30+2x9,40",
        "--max-num-batched-tokens=16",
    ];
    let run = Command::new(env!("CARGO_BIN_EXE_kvern"))
        .arg("bench")
        .arg(model)
        .args(short)
        .args(["--max-num-seqs=3", "--threads=2", "--log-level=error"])
        .args(args)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).unwrap()
}

#[test]
fn json_has_a_line_for_each_workload_and_limit() {
    let output = bench(&["--json", "--limits"]);
    let lines: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let name = |line: &Value| line["workload"].as_str().unwrap().to_owned();
    let names: Vec<String> = lines.iter().map(name).collect();
    assert_eq!(names[..5], ["prefill 24", "decode 1x20", "decode 3x5", "attention 1x30+2x9", "attention 40"]);
    assert_eq!(names[5..7], ["limit read", "limit fma f32"]);
    for line in &lines {
        let rounds: Vec<f64> = line["rounds"].as_array().unwrap().iter().map(|rate| rate.as_f64().unwrap()).collect();
        assert_eq!(rounds.len(), 2, "{line}");
        assert!(rounds.iter().all(|rate| rate.is_finite() && *rate > 0.0), "{line}");
        let middle = rounds.iter().sum::<f64>() / 2.0;
        // Reading a number from JSON may cost its last bit.
        assert!((line["median"].as_f64().unwrap() / middle - 1.0).abs() < 1e-12, "{line}");
        assert_eq!(line["threads"], 2);
        assert_eq!(line["version"], env!("CARGO_PKG_VERSION"));
        assert!(line["device"].as_str().unwrap().contains(line["isa"].as_str().unwrap()), "{line}");
    }
    let share = |line: &Value| line["limit_share"].as_f64();
    assert!(share(&lines[0]).unwrap() > 0.0 && share(&lines[1]).unwrap() > 0.0 && share(&lines[2]).is_none());
    assert!(share(&lines[3]).unwrap() > 0.0 && share(&lines[4]).unwrap() > 0.0);
    assert_eq!((&lines[4]["tokens"], &lines[4]["read_bytes"]), (&80.into(), &Value::Null));
    let idle: Vec<Option<f64>> = lines.iter().map(|line| line["idle_share"].as_f64()).collect();
    assert!(idle[1..3].iter().all(|share| share.is_some_and(|share| share > 0.0 && share < 1.0)), "{idle:?}");
    assert!(idle[0].is_none() && idle[3..].iter().all(Option::is_none), "only decoding has steps one after the other");
}

#[test]
fn the_table_names_machine_and_workloads() {
    let table = bench(&["--cpu-isa=scalar"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 7, "{table}");
    assert!(lines[0].contains("cpu (scalar, 2 threads)"), "{table}");
    let starts = ["prefill 24 ", "decode 1x20 ", "decode 3x5 ", "attention 1x30+2x9 ", "attention 40 "];
    for (line, start) in lines[2..].iter().zip(starts) {
        assert!(line.starts_with(start), "{table}");
        assert_eq!(line.contains("% idle between steps"), start.starts_with("decode"), "{table}");
    }
}

/// A CPU's sampler is the worker's: there is none to time alone.
#[test]
fn sampling_alone_needs_a_gpu() {
    let run = Command::new(env!("CARGO_BIN_EXE_kvern"))
        .arg("bench")
        .arg(support::model_path())
        .args(["--sampling=greedy:2", "--device=cpu", "--log-level=error"])
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    let message = String::from_utf8(run.stderr).unwrap();
    assert!(message.contains("--sampling: expected a GPU, whose sampler can be timed alone, found cpu"), "{message}");
}

#[test]
fn a_workload_that_does_not_fit_is_refused() {
    let run = Command::new(env!("CARGO_BIN_EXE_kvern"))
        .arg("bench")
        .arg(support::model_path())
        .args(["--decode=1x8190", "--steps=3", "--log-level=error"])
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    let message = String::from_utf8(run.stderr).unwrap();
    assert!(message.contains("decode 1x8190: expected a context of at most 8192 tokens, found 8193"), "{message}");
}
