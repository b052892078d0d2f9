"""Four pretend devices, so that layouts over devices are tested everywhere; programs that are compiled quickly."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# Most programs here run for less time than it takes to compile them. They are compiled in less of it, to run nearly as
# fast, and kept for the tests after them; a slow test of test_end_to_end.py trains as a user does.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
FLAGS += " --xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# JAX writes what it keeps without care for who reads meanwhile, so every process of tests has its own folder, and the
# programs that they start, some of which are killed, have others.
COMPILED = tempfile.mkdtemp(prefix="dpo_jax-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is installed, and is loud where it finds no TPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing folder is an error at once, not after retries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin, and starve each other beside other tests

if jax := sys.modules.get("jax"):  # of a process that was forked after the import
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Libraries make millions of objects that live as long as the process. To look through them takes a tenth of the time.
gc.set_threshold(100_000, 50, 100)

SHARED = Path(os.environ.get("DPO_JAX_SHARED", Path(__file__).parent.parent.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, models and tokenizers."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data: {SHARED} is absent (set DPO_JAX_SHARED)")
    return SHARED


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def pytest_collection_finish() -> None:
    """Leaves what is imported by now to itself in later collections."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Removes the compiled programs that this session has kept."""
    shutil.rmtree(COMPILED, ignore_errors=True)
