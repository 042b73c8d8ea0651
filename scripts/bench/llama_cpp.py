"""Builds the peer: llama.cpp out of the source package of llama-cpp-python, with clang, natively and for AVX2 alone.

gcc 12.2 compiles llama.cpp's AMX path into code that dies with SIGILL (a wrong tile configuration), so clang it is: the peer
shall run at its best. Everything is below target/; what is there already is not made again.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TARGETS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server")

COMMON_FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
                "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DGGML_OPENMP=ON")
BUILDS = {
    "native": ("-DGGML_NATIVE=ON",),
    "avx2": ("-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON",
             "-DGGML_F16C=ON", "-DGGML_BMI2=ON", "-DGGML_AVX512=OFF"),
}

INSTALL_HINT = """clang and its OpenMP library are needed to build llama.cpp and were not found; install them, as by
  apt-get install clang libomp-dev        (Debian, Ubuntu)
  dnf install clang libomp-devel          (Fedora)
or name another C compiler, whose C++ one is named like it, by --compiler"""


class Peer:
    """The peer's binaries and model files, below `root`'s target/."""

    def __init__(self, root: pathlib.Path, compiler: str, tree: "pathlib.Path | None",
                 builds: "pathlib.Path | None") -> None:
        self.folder = root / "target" / "peer"
        self.builds = builds or self.folder
        self.models = root / "target" / "peer-models"
        self.compiler = compiler
        # An unpacked source of the same version that is there already.
        self.given_tree = tree

    def source(self) -> pathlib.Path:
        """Fetch and unpack the source package; only one with the right hash."""
        if self.given_tree:
            return self.given_tree
        tree = self.folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
        if tree.is_dir():
            return tree
        self.folder.mkdir(parents=True, exist_ok=True)
        archive = self.folder / f"llama_cpp_python-{VERSION}.tar.gz"
        if not archive.is_file():
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                            "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "--dest", str(self.folder)], check=True)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            sys.exit(f"{archive}: expected sha256 {SHA256}, found {digest}")
        # Beside its place, so that a broken unpacking leaves nothing that looks whole.
        part = self.folder / "unpacked"
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(archive) as files:
            files.extractall(part)
        os.replace(part / f"llama_cpp_python-{VERSION}", self.folder / f"llama_cpp_python-{VERSION}")
        part.rmdir()
        return tree

    def build(self, name: str, python: pathlib.Path) -> pathlib.Path:
        """The folder of the binaries of a build, made if need be."""
        out = self.builds / name
        binaries = out / "bin"
        if all((binaries / target).is_file() for target in TARGETS):
            return binaries
        folder, name_c = os.path.split(self.compiler)
        compiler_cxx = os.path.join(folder, name_c.replace("clang", "clang++").replace("gcc", "g++"))
        if not (shutil.which(self.compiler) and shutil.which(compiler_cxx)):
            sys.exit(INSTALL_HINT)
        cmake, ninja = python.parent / "cmake", python.parent / "ninja"
        log = self.folder / f"{name}.log"
        print(f"building llama.cpp ({name}) in {out}; this takes minutes, the log is {log}", file=sys.stderr)
        configure = [str(cmake), "-S", str(self.source()), "-B", str(out), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                     f"-DCMAKE_C_COMPILER={self.compiler}", f"-DCMAKE_CXX_COMPILER={compiler_cxx}", *COMMON_FLAGS,
                     *BUILDS[name]]
        self.folder.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            for command in (configure, [str(ninja), "-C", str(out), *TARGETS]):
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
                    file.flush()
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    sys.exit(f"{tail}\nbuilding llama.cpp failed; {log} says more. Where OpenMP was not found:\n{INSTALL_HINT}")
        return binaries

    def model(self, default: pathlib.Path, stored: str, binaries: pathlib.Path) -> pathlib.Path:
        """The default model stored as `stored`, made from the default file (so BF16 and F32 hold its rounded weights)."""
        if stored == "Q4_1":
            return default
        path = self.models / f"SmolLM2-135M-Instruct.{stored}.gguf"
        if path.is_file() and path.stat().st_mtime >= default.stat().st_mtime:
            return path
        self.models.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        command = [str(binaries / "llama-quantize"), "--allow-requantize", str(default), str(part), stored]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stderr[-2000:]}\nllama-quantize cannot make {stored}")
        os.replace(part, path)
        return path


def environment(folder: pathlib.Path, requirements: pathlib.Path) -> pathlib.Path:
    """A Python with the packages of `requirements`, in `folder`; returns its interpreter."""
    python = folder / "venv" / "bin" / "python"
    stamp = folder / "venv" / "installed.txt"
    wanted = requirements.read_text()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    venv.create(folder / "venv", with_pip=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r",
                    str(requirements)], check=True)
    stamp.write_text(wanted)
    return python
