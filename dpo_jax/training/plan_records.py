"""The plan of a run, as records: the memory of its programs, and what a target's compiler made of its step."""

from typing import NamedTuple

from dpo_jax.config.schema import Config, MeshConfig
from dpo_jax.data import pack
from dpo_jax.training.program import Collective
from dpo_jax.training.roofline import Roofline, Work
from dpo_jax.training.targets import Target


class Memory(NamedTuple):
    """Bytes on each device during a step or another program.

    Attributes:
      trained: the trained parameters, float32.
      frozen: the base of adapters, or a reference that stays on the devices: an online one, or one for KL of samples.
      optimizer: the optimizer's state.
      gradients: float32 gradients, summed over microbatches.
      logits: one chunk of logits, and its gradient.
      activations: all other temporary memory of the compiled program: activations, casts, workspace.
      batch: the batch of a step.
      other: the program itself, results that replace no argument, and padding of arguments.
    """

    trained: int
    frozen: int
    optimizer: int
    gradients: int
    logits: int
    activations: int
    batch: int
    other: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


class Compiled(NamedTuple):
    """A step as a target's compiler compiled it.

    Attributes:
      target: the devices.
      mesh: their axes.
      groups: of fast links, for each device in the order of the program.
      attention: a message about the attention backend.
      kernel: its name.
      seconds: that compiling took.
      text: of the program; "" if the compiler refused it because it does not fit.
      collectives: of the program.
      work: of a step.
      roofline: the times of a step; None without a program.
    """

    target: Target
    mesh: dict[str, int]
    groups: list[int]
    attention: str
    kernel: str
    seconds: float
    text: str
    collectives: list[Collective]
    work: Work
    roofline: Roofline | None


class Pass(NamedTuple):
    """A program that a run has beside its step.

    Attributes:
      name: what it is for, "reference" or "sampling".
      memory: bytes on each device while it runs.
      seconds: that compiling took.
    """

    name: str
    memory: Memory
    seconds: float


class Plan(NamedTuple):
    """The plan of a run.

    Attributes:
      config: the run's config.
      parameters: number of parameters of the model.
      trained: number of trained parameters: of the model, or of its adapters.
      shape: layout of a batch.
      memory: bytes on each device.
      mesh: the size of each axis.
      compiled: by a target's compiler; None for a plan on JAX's own devices.
      passes: the programs that the run has beside its step.
    """

    config: Config
    parameters: int
    trained: int
    shape: pack.Layout
    memory: Memory
    mesh: MeshConfig
    compiled: Compiled | None = None
    passes: tuple[Pass, ...] = ()

    @property
    def largest(self) -> tuple[str, Memory]:
        """The program that needs the most memory: "step", or the name of a pass; and that memory."""
        programs = [("step", self.memory), *((one.name, one.memory) for one in self.passes)]
        return max(programs, key=lambda one: one[1].total)
