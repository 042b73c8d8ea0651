"""What every result carries, tables, and the sections of docs/performance.md that commands write."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "docs" / "performance.md"
MODEL = ROOT / "models-cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def about(threads: int) -> dict:
    """Commit, machine and day."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True,
                            text=True, check=False).stdout.strip()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"commit": commit or "unknown", "machine": processor(), "cores": os.cpu_count(), "threads": threads,
            "system": f"{platform.system()} {platform.release()}", "date": today}


def headline(found: dict) -> str:
    return (f"Kvern {found['commit']}, {found['machine']}, {found['cores']} cores, {found['threads']} threads, "
            f"{found['date']}.")


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def release_binary() -> pathlib.Path:
    """The release build of this checkout."""
    subprocess.run([os.environ.get("CARGO", "cargo"), "build", "--release", "--package", "kvern"], cwd=ROOT, check=True)
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "kvern"


def default_model() -> pathlib.Path:
    if not MODEL.is_file():
        sys.exit(f"{MODEL} is missing: run `make model`")
    return MODEL


def table(head: "list[str]", rows: "list[list[str]]") -> str:
    """A Markdown table."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = ([cell.ljust(width) for cell, width in zip(row, widths)] for row in [head, rule, *rows])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values: "list[float]", digits: int = 0) -> str:
    """`median (least to most)`."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def median(values: "list[float]") -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def save(name: str, result: dict) -> pathlib.Path:
    path = ROOT / "target" / name / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def write_section(name: str, text: str) -> None:
    """Put `text` between the marks of a section of docs/performance.md."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    document = DOCUMENT.read_text()
    if document.count(begin) != 1 or document.count(end) != 1:
        sys.exit(f"{DOCUMENT}: expected one pair of the marks {begin} and {end}")
    before, rest = document.split(begin)
    _, after = rest.split(end)
    DOCUMENT.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
