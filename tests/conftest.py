"""Four pretend devices, so that layouts over devices are tested everywhere; shapes that do not match are errors."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing folder is an error at once, not after retries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin, and starve each other beside other tests

import pytest

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
