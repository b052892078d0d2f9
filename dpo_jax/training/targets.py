"""Accelerators that a run can be compiled for without having them: their data sheets, names and topologies."""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from dpo_jax.errors import UserError
from dpo_jax.libtpu import WITHOUT_TPU

GB, TB = 10**9, 10**12


class Chip(NamedTuple):
    """One accelerator, from its maker's data sheet.

    Attributes:
      platform: JAX's name of it, "tpu" or "gpu".
      peak: floating-point operations a second, dense bfloat16 matmuls.
      memory: bytes of memory.
      bandwidth: bytes a second of its memory.
      link: bytes a second that leave it over the links of a slice (ICI) or machine (NVLink), one way, over all of them.
      network: bytes a second that leave it over the network of the data center, one way.
      source: where the numbers are from.
      devices: JAX devices that it has; the numbers are divided by them.
    """

    platform: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    source: str
    devices: int = 1

    def device(self) -> "Chip":
        """Returns the share of one JAX device."""
        n = self.devices
        parts = (self.peak, self.memory, self.bandwidth, self.link, self.network)
        return Chip(self.platform, *(x / n for x in parts), source=self.source)


_TPU7X = "cloud.google.com/tpu/docs/tpu7x: the table beside v5p and v6e"
_DGX = "network: one {} Gb/s adapter a GPU, as in {}"
CHIPS = {
    "a100": Chip("gpu", 312e12, 80 * 2**30, 2.039 * TB, 300 * GB, 25 * GB,
                 "NVIDIA A100 80GB SXM data sheet; " + _DGX.format(200, "DGX A100")),
    "h100": Chip("gpu", 989.4e12, 81_559 * 2**20, 3.35 * TB, 450 * GB, 50 * GB,
                 "NVIDIA H100 SXM data sheet (half of the sparse rate); " + _DGX.format(400, "DGX H100")),
    "h200": Chip("gpu", 989.4e12, 143_771 * 2**20, 4.8 * TB, 450 * GB, 50 * GB,
                 "NVIDIA H200 SXM data sheet (half of the sparse rate); " + _DGX.format(400, "DGX H200")),
    "b200": Chip("gpu", 2250e12, 180 * GB, 8.0 * TB, 900 * GB, 50 * GB,
                 "NVIDIA HGX B200 data sheet, an eighth (half of the sparse rate); " + _DGX.format(400, "DGX B200")),
    "v4": Chip("tpu", 275e12, 32 * 2**30, 1.2 * TB, 300 * GB, 6.25 * GB,
               "cloud.google.com/tpu/docs/v4; links: 6 of 50 GB/s, arXiv 2304.01433; network as v5p's"),
    "v5e": Chip("tpu", 197e12, 16 * 2**30, 819 * GB, 200 * GB, 3.125 * GB,
                "cloud.google.com/tpu/docs/v5e; network: 2 of 100 Gb/s for 8 chips"),
    "v5p": Chip("tpu", 459e12, 95 * 2**30, 2.765 * TB, 600 * GB, 6.25 * GB, _TPU7X),
    "v6e": Chip("tpu", 918e12, 32 * 2**30, 1.638 * TB, 400 * GB, 12.5 * GB, _TPU7X),
    "tpu7x": Chip("tpu", 2307e12, 192 * 2**30, 7.38 * TB, 600 * GB, 12.5 * GB, _TPU7X, devices=2),
}  # fmt: skip

# What the CUDA compiler asks of a GPU: (compute capability, multiprocessors, units of each, its shared memory, that of
# a block, level-2 cache in MiB, GHz), from NVIDIA's architecture white papers and CUDA's table of compute capabilities.
GPUS = {
    "a100": (8, 108, 64, 167_936, 166_912, 40, 1.41),
    "h100": (9, 132, 128, 233_472, 232_448, 50, 1.98),
    "h200": (9, 132, 128, 233_472, 232_448, 50, 1.98),
    "b200": (10, 148, 128, 233_472, 232_448, 126, 1.965),
}
GPU_TEXT = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units}
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
 l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {block}
 cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
runtime_version: {{ major: 13 minor: 0 patch: 0 }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""
FORMS = "tpu:v5p:4x4x4, tpu:2xv5p:4x4x4 (two slices), gpu:h100:1x8 (hosts x GPUs) or gpu:2xb200:9x4 (two NVLink racks)"


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: key of `CHIPS`.
      slices: groups of chips with fast links among them; the network joins them.
      shape: chips of a slice along each of its dimensions; for GPUs hosts and GPUs of each.
    """

    name: str
    slices: int
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The data sheet, for one JAX device."""
        return CHIPS[self.name].device()

    @property
    def groups(self) -> list[int]:
        """For each device the slice that it is in, in the order of `target_devices`."""
        size = math.prod(self.shape) * CHIPS[self.name].devices
        return [i // size for i in range(self.slices * size)]

    @property
    def platform(self) -> str:
        """JAX's name of the devices, "tpu" or "gpu"."""
        return CHIPS[self.name].platform


def parse_target(text: str) -> Target:
    """Returns the target that a text names: platform:[SLICESx]CHIP:SHAPE.

    The hosts of GPUs are slices of their own, joined by the network, unless the text says how many slices there are.

    Raises:
      UserError: the text has another form, or names an unknown chip.
    """
    match = re.fullmatch(r"(tpu|gpu):(?:(\d+)x)?([a-z]\w*)(?::(\d+(?:x\d+)*))?", text)
    if match is None:
        raise UserError(f"--target {text}: write {FORMS}")
    platform, slices, name = match[1], int(match[2] or 1), match[3]
    known = [key for key, chip in CHIPS.items() if chip.platform == platform]
    if name not in known:
        raise UserError(f"--target {text}: {name} is not known; choose one of {', '.join(known)}")
    shape = tuple(map(int, match[4].split("x"))) if match[4] else ()
    if not shape:
        raise UserError(f"--target {text}: has no shape; write {FORMS}")
    if 0 in (slices, *shape):
        raise UserError(f"--target {text}: has no devices; every number must be at least 1")
    if platform == "gpu" and len(shape) != 2:
        raise UserError(f"--target {text}: write hosts x GPUs of each, as in gpu:{name}:1x8")
    if platform == "gpu" and not match[2]:
        slices, shape = shape[0], (1, shape[1])
    return Target(name, slices, shape)


def target_devices(target: Target) -> list[Any]:
    """Returns the devices of a target, for meshes to compile for; nothing can run on them.

    Call it before JAX starts a backend, or under `JAX_PLATFORMS=cpu`.

    Raises:
      UserError: the compiler is not installed, or knows no such topology.
    """
    check_compiler(target)
    topology = "x".join(map(str, target.shape))
    try:
        return _tpu(target, topology) if target.platform == "tpu" else _gpu(target, topology)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
        reason = str(e).splitlines()[0]
        raise UserError(f"--target: the compiler refuses {target.name}:{topology} ({reason}); change the shape") from e


def check_compiler(target: Target) -> None:
    """Refuses a target whose compiler is not installed."""
    if target.platform == "tpu":
        there = bool(os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu"))
    else:
        there = _is_installed("jax_plugins.xla_cuda13")
    if not there:
        extra = f"pip install 'dpo_jax[aot-{target.platform}]'"
        raise UserError(f"--target {target.platform}: its compiler is not installed; run: {extra}")


def _tpu(target: Target, topology: str) -> list[Any]:
    from jax.experimental import topologies  # imported late: few commands need it

    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": target.slices} if target.slices > 1 else {}
    if target.name == "v4":
        options["chip_config_name"] = "megacore"  # one JAX device a chip, which is JAX's default on a v4
    return list(topologies.get_topology_desc(f"{target.name}:{topology}", "tpu", **options).devices)


def _gpu(target: Target, topology: str) -> list[Any]:
    from jax.experimental import topologies

    options: dict[str, Any] = {"target_config": gpu_text(target.name), "topology": f"{target.slices}x{topology}"}
    return list(topologies.get_topology_desc(target.name, "cuda", **options).devices)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def gpu_text(name: str) -> str:
    """Returns the text form of XLA's GpuTargetConfigProto for a GPU."""
    major, cores, units, shared, block, cache, clock = GPUS[name]
    chip = CHIPS[name]
    values: Mapping[str, Any] = {
        "major": major, "cores": cores, "units": units, "shared": shared, "block": block, "cache": cache * 2**20,
        "clock": clock, "memory": int(chip.memory), "bandwidth": int(chip.bandwidth), "name": f"NVIDIA {name.upper()}",
    }  # fmt: skip
    return GPU_TEXT.format(**values)
