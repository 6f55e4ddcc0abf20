"""The contract of a method: it declares; engine, meter, report, evaluation and planner obey.

A method is an `nn.Module` that turns the views of a batch into a loss. The members below declare what else happens to
its parameters, what it carries from step to step, what is worth watching and what that means; nothing outside
`largescale/methods/` knows a method by name. Randomness must follow from the configuration, the step and sample ids,
and whatever a step leaves for the next one must be in `state`; otherwise a resumed run would not be exact.
A method whose loss can span the micro-batches of a step is an `embedding_method.EmbeddingMethod`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from largescale.config import Config, MethodConfig, augment_of_group
from largescale.data.length import Length
from largescale.data.views import Views
from largescale.methods.choice import Choice
from largescale.methods.milestone import Milestone
from largescale.methods.phase import PlainEmbeddings
from largescale.methods.pictures import Pictures
from largescale.methods.symptom import Row, Symptom
from largescale.optim.roles import MAIN, Role


class Output(NamedTuple):
    """What a method returns for a micro-batch.

    A tuple, since FSDP2 looks for the tensors to hook in tuples but not in data classes.

    Attributes:
        loss: scalar, the mean over this rank's images; the engine averages gradients over ranks and micro-batches.
        signs: detached, by the names that `Method.signs` declares.
        evidence: detached tensors by name, kept on disk if the step turns out to be unusable.
    """

    loss: Tensor
    signs: dict[str, Tensor]
    evidence: dict[str, Tensor]


@dataclass(frozen=True)
class Sign:
    """A value that a method reports in every step, and how it is combined.

    Attributes:
        over: `mean` or, for booleans, `any`: over micro-batches, ranks and the steps between two logged ones.
        shape: of the value.
    """

    over: Literal["mean", "any"] = "mean"
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Average:
    """A module whose weights are a running average of another's, as a teacher's are of its student's.

    The engine averages, since only it knows masters and pieces: once per update, but not when fp16 skips one. At the
    start both are equal.

    Attributes:
        student, teacher: names of modules with parameters of equal names and shapes; the teacher's take no gradient.
        buffers: whether running statistics of BatchNorm are averaged too, for a teacher in evaluation mode.
    """

    student: str
    teacher: str
    buffers: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves in the report, from columns of metrics.jsonl.

    Attributes:
        title: above them.
        columns: the column of each curve, by its label.
        limits: of the vertical axis.
    """

    title: str
    columns: dict[str, str]
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Exemplars:
    """Outputs of a head best explained by the images with the largest scores; a gallery in the report.

    Attributes:
        name: what one of them is called, such as "prototype"; the file of scores is named after it.
        title: of the gallery.
    """

    name: str
    title: str


class Method(nn.Module):
    """The base class of methods; a method overrides only what it needs.

    Attributes:
        title: its name as people write it.
        reference: packaged recipe that `largescale init` follows where there are GPUs; empty for none.
        small_reference: the same without GPUs; `small/NAME` if empty.
        Settings: its keys under `method` in a configuration.
        spoilers: probabilities and strengths of `data.augment` that are to be 0, since such changes hide or give away
            what there is to learn, and why; `largescale init` sets them so, and a run that does not is warned.
        has_answers: whether its task has right answers, of which `measures` reports the share, `task_accuracy`.
        rates: keys under `method` that `largescale init` scales with the batch, as it does `optim.lr`.
        square_crops: whether `largescale init` proposes crops of the shape of views, which squeeze nothing.
        largest_view: side in pixels beyond which `largescale init` proposes no views; 0 for as large as images allow.
        backbone: the network that is trained.
        num_features: width of its features.
        encoder_name: module that is evaluated and exported, such as a teacher's backbone.
        head_name: module that turns the encoder's features into embeddings, to be exported with it; empty for none.
        signs: what `forward` reports to be watched.
        held: frozen networks beside its own, whole on every rank and in no checkpoint; `begin` fills it.
        class_names: names of what `classify` tells apart; empty for a method that is no classifier.
        objectives: losses of a step, in the order in which it takes them; see `forward`.
        length: of the run; set after `__init__`, by `of_run`.
        exemplars: set if `exemplar_scores` is implemented.
        pictures: set if `draw` is implemented.
        later_phases: whether offline phases come before later steps too, not the first alone; before each of them a run
            is saved.
        exemplar_state: attributes, and entries of `state`, that `exemplar_scores`, or what its task asks, needs beside
            the weights.
    """

    title: ClassVar[str]
    reference: ClassVar[str] = ""
    small_reference: ClassVar[str] = ""
    Settings: ClassVar[type[MethodConfig]]
    spoilers: ClassVar[Mapping[str, str]] = MappingProxyType({})
    has_answers: ClassVar[bool] = False
    rates: ClassVar[tuple[str, ...]] = ()
    square_crops: ClassVar[bool] = False
    largest_view: ClassVar[int] = 0
    exemplars: ClassVar[Exemplars | None] = None
    later_phases: ClassVar[bool] = False
    exemplar_state: ClassVar[tuple[str, ...]] = ()
    pictures: ClassVar[Pictures | None] = None
    encoder_name: ClassVar[str] = "backbone"
    head_name: ClassVar[str] = ""
    objectives: tuple[str, ...] = (MAIN,)
    backbone: nn.Module
    num_features: int
    signs: dict[str, Sign]
    held: Sequence[nn.Module] = ()
    class_names: Sequence[str] = ()
    length: Length

    def of_run(self, length: Length) -> None:
        """Called once when the method is built, for schedules and state that depend on the length of the run."""
        self.length = length

    def objectives_of(self, step: int) -> tuple[str, ...]:
        """Those of `objectives` that a step has, in that order: all, unless the method comes in stages."""
        return self.objectives

    @classmethod
    def misfit(cls, config: Config, length: Length) -> str:
        """Why so many images cannot be trained on with as many ranks as there are, in a line; empty if they can. Asked
        before a network is made or an image is read: state by sample id must fit into memory.
        """
        return ""

    @classmethod
    def suited(cls, config: Config, length: Length) -> dict[str, Choice]:
        """What of its settings should follow from the batch and the corpus: keys under `method` with values and
        reasons, for a recipe that `largescale init` writes.

        Args:
            config: the recipe so far, with settings of a packaged recipe for networks of this size.
            length: of the run and of the corpus.
        """
        return {}

    @classmethod
    def without_start(cls) -> dict[str, Any]:
        """Keys under `method` and values with which a run begins with what most of it is, where it begins with
        something else: `largescale init` measures the speed of its first steps.
        """
        return {}

    def begin(self) -> None:
        """Called once by the engine that trains the method, when it is on its device and its length is known; not where
        it is evaluated. State that only training needs gets its room here, such as `rows_by_id.RowsById`.
        """

    def forward(self, views: Views, step: int) -> Output:
        """The loss of a micro-batch. Says under "Collectives:" what it exchanges.

        A method with several `objectives`, as adversarial ones have, gets the name of one as a third argument. Each has
        its own forward and backward pass, check, clipping and update, one after the other: a later one sees what an
        earlier one has changed. It moves the parameters whose `Role.objective` it is, and `MAIN`, the last one, those
        without; gradients of all others are dropped, and they, their momentum and their step counts stay as they are.
        The loss has to depend on all that its objective moves. Together the objectives report all `signs`; networks
        that run in several of them should feed running statistics in one (`models.running_statistics`).
        """
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Features [B, num_features] of normalised images [B, 3, S, S], as evaluation and export see them."""
        return self.get_submodule(self.encoder_name)(images)

    def classify(self, images: Tensor) -> Tensor:
        """Scores [B, K] of normalised images, where `class_names` names K classes."""
        raise NotImplementedError

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings [B, D] of normalised images [B, 3, S, S] in the space that they share with sounds, near those of
        sounds that belong to them by Euclidean distance; only where `MethodConfig.sounds` asks for sound.
        """
        raise NotImplementedError

    def embed_sounds(self, sounds: Tensor) -> Tensor:
        """Embeddings [B, D] in the same space of windows of sound [B, T], as `Views.sounds` (or floating-point numbers
        in [-1, 1]), of as many samples per second and in all as `MethodConfig.sounds` says.
        """
        raise NotImplementedError

    def sound_maps(self, images: Tensor, sounds: Tensor) -> Tensor:
        """How well each place of normalised images [B, 3, S, S] fits the window of sound [B, T] that is heard with it:
        [B, h, w], more is better; only where `MethodConfig.sounds` asks for sound.
        """
        raise NotImplementedError

    def roles(self) -> Sequence[Role]:
        """Which parameters need special treatment; if several roles own one, the first counts."""
        return ()

    def averages(self) -> Sequence[Average]:
        """The teachers and the students they follow."""
        return ()

    def average_momentum(self, step: int) -> float:
        """Fraction of themselves that teachers keep after the update of a step."""
        raise NotImplementedError

    def after_update(self, step: int) -> None:
        """Called after the update of a step, behind the teachers (not where fp16 passes it over). Works on local pieces
        alone.
        """

    def state(self, mesh: DeviceMesh) -> dict[str, Tensor]:
        """State carried from step to step besides parameters and buffers, as DTensors over the mesh of all ranks, so
        that it loads into another number of ranks.
        """
        return {}

    def measures(self, loss: float, signs: dict[str, Tensor], num_images: int) -> dict[str, float]:
        """What is logged of an interval.

        Args:
            loss: its mean.
            signs: combined over the interval; for `any`, a number above 0 means true.
            num_images: different images seen in it.
        """
        return {name: float(value) for name, value in signs.items() if value.numel() == 1}

    def phase_due(self, step: int) -> bool:
        """Whether an offline phase comes before a step: a function of the configuration and `length` alone."""
        return False

    def phase_embeds(self, step: int) -> bool:
        """Whether the phase before a step wants `plain` of every image, likewise. Where it does not, as where a memory
        of all images is what it works on, no image is read and its `corpus` is empty.
        """
        return True

    def phase_sums(self, step: int) -> bool:
        """Whether the phase before a step wants no row of an image, but the sum of `plain` over this rank's images,
        likewise: one row in float64, exact for whole numbers, so that the corpus may be of any size.
        """
        return False

    def plain(self, images: Tensor) -> Tensor:
        """What a phase wants to know of images [B, 3, S, S], resized and cropped at their centre: rows [B, D]. Called
        through `forward` without a graph, in whatever mode networks are; a row must not depend on the other images.
        """
        raise NotImplementedError

    def phase(self, step: int, corpus: PlainEmbeddings, beat: Callable[[str], None]) -> dict[str, float]:
        """Make something of the whole corpus before a step, and keep it in `state`, such as clusters.

        Args:
            step: about to be done.
            corpus: `plain` of every image, this rank's part; empty if `phase_embeds` says so.
            beat: to be called with what is being done, now and then and equally often by all ranks: so nobody takes it
                for a hang, and a run that is to stop leaves there.

        Returns:
            What is worth logging.

        Collectives: its own, and one all-reduce of a number per call of `beat`; every rank calls it.
        """
        raise NotImplementedError

    @classmethod
    def phase_bytes(cls, config: Config, images: int) -> int:
        """Most bytes that a rank holds in a phase beside networks, activations and blocks of a fixed size, once images
        are embedded: for a plan, and for what `misfit` refuses.

        Args:
            config: of the run.
            images: of the corpus.
        """
        return 0

    def exemplar_scores(self, features: Tensor) -> list[Tensor]:
        """Scores [N, K] of each head, of backbone features [N, num_features], where `exemplars` is set."""
        raise NotImplementedError

    def has_exemplars(self) -> bool:
        """Whether there is something to score by: what a phase finds is not there before the first one."""
        return all(bool(getattr(self, name).any()) for name in self.exemplar_state)

    def draw(self, views: Views) -> list[Tensor]:
        """What the task makes of images, where `pictures` is set: of each of its columns [B, 3, h, w] in [0, 1].

        Args:
            views: a single one [B, 3, S, S] of the size of a large view, cropped at the centre, and a window of sound
                around it if the method hears. The method is in evaluation mode, and there is no graph.
        """
        raise NotImplementedError

    @classmethod
    def complaints(cls, config: Config, length: Length) -> list[str]:
        """One line for each setting that does not fit the method, the run's length or its number of images, and what to
        set.
        """
        places = range(len(config.data.crops))
        return [
            f"data.augment.{name}={most:g}: {why}; set it to 0"
            for name, why in cls.spoilers.items()
            if (most := max(getattr(augment_of_group(config.data, place), name) for place in places)) > 0
        ]

    @classmethod
    def milestones(cls, config: Config) -> list[Milestone]:
        """What the method starts to do in the course of a run."""
        return []

    @classmethod
    def brief(cls, row: Row) -> str:
        """What a console line adds after the loss; empty, or starting with a space."""
        return ""

    @classmethod
    def symptoms(cls, config: Config) -> list[Symptom]:
        """How runs of this method look that go wrong, the cause before what follows from it; the doctor judges by them.

        Args:
            config: of the run; advice starts from its settings.
        """
        return []

    @classmethod
    def young_epochs(cls, config: Config) -> float:
        """Epochs at the start in which signs mean nothing yet, as while a memory of every image fills."""
        return 0.0

    @classmethod
    def loss_references(cls, config: Config) -> dict[str, float]:
        """Meaningful values of the loss by their meaning; drawn as lines in the report's loss panel."""
        return {}

    @classmethod
    def panels(cls, config: Config) -> list[Panel]:
        """The method's curves in the report."""
        return []
