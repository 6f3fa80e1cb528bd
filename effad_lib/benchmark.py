"""Speed of training and detection beside the paper's algorithms written down literally, and cost as work grows."""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import pandas as pd
import torch

from effad_lib.detector import EfficientAD
from effad_lib.images import NaturalImages, Size, change_colour, check_size, to_float
from effad_lib.latency import LatencySettings, chance_detector, copy_peak, grid, measure, pause_on, peak
from effad_lib.memory import peak_memory
from effad_lib.networks import check_network, multiply_adds
from effad_lib.progress import progress
from effad_lib.runs import PROJECT, Run
from effad_lib.settings import Settings, check_threads, cores, device_name, pick_device
from effad_lib.training import Draw, Trainer, TrainingSettings

LITERAL = "tests/literal.py"
"""The paper's Algorithms 1 and 2 as the tests have them, in the project's folder; an installed package lacks it."""

STEPS = {"cpu": 1, "cuda": 20, "mps": 20}
"""Steps of a training in one call that is timed: an accelerator works on one while the next is prepared."""


@dataclass(frozen=True)
class BenchmarkSettings(Settings):
    """Settings of `effad bench`."""

    sizes: list[str] = ("S", "XS")  # of the networks: S, M, XS
    image_size: list[int] = (256, 256)  # height and width in pixels
    precisions: list[str] = ("float32", "bfloat16")  # of training; inference has those of the exports
    optimiser: str = "adam"  # of effad's training: adam or muon; that of the literal one is Adam
    compiled: str = ""  # a mode of torch.compile for training too: default, reduce-overhead, max-autotune
    seconds: float = 10.0  # to measure each case for, five times at least
    inference: bool = True  # measure detection too
    exports: bool = True  # in ONNX Runtime and OpenVINO as well
    growth: bool = False  # instead of both, at its own sizes: cost against number and size of images and batch
    threads: int = 0  # of the CPU; 0 takes all cores, which wants a machine without other work
    device: str = "auto"  # auto, cpu, cuda or mps

    def check(self) -> None:
        for size in self.sizes:
            check_network(size)
        check_size(self.image_size)
        for name in ("sizes", "precisions"):
            self.require(len(getattr(self, name)) > 0, name, "at least one name")
        self.require(self.seconds > 0, "seconds", "a number above 0")
        check_threads(self.threads)
        for precision in self.precisions:  # says what is wrong with the others
            TrainingSettings(**self.training, precision=precision)

    @property
    def training(self) -> dict[str, str]:
        """The settings of a training that are given, but for its size and precision."""
        return {name: getattr(self, name) for name in ("optimiser", "compiled", "device")}

    @property
    def cores(self) -> int:
        """The number of threads, spelt out."""
        return self.threads or cores()


def literal_algorithms() -> ModuleType | None:
    """Return `tests/literal.py` as a module, or None where the project's folder lacks it."""
    path = PROJECT / LITERAL
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("literal", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def trainer_of(size: str, image_size: Sequence[int], *, images: int = 8, **settings: object) -> Iterator[Trainer]:
    """Yield a training of random images and networks that is ready for its first step, in a folder that is deleted."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = TrainingSettings(run_folder=folder, size=size, image_size=image_size, **settings)
        torch.manual_seed(0)
        detector = EfficientAD(size, image_size=tuple(image_size)).to(pick_device(chosen.device))
        pixels = torch.randint(0, 256, (images, 3, *image_size), dtype=torch.uint8)
        yield Trainer(chosen, Run(folder), detector, pixels, pixels[:2], NaturalImages())


def literal_step(literal: ModuleType, trainer: Trainer) -> Callable[[int], float]:
    """Return steps of Algorithm 1 as `tests/literal.py` has it, with the trainer's weights, images and first draw.

    They return the last total loss; of a batch the losses are taken one image after the other.
    """
    detector, settings, device = trainer.detector, trainer.settings, trainer.device
    T, S = (literal.pdn(detector.size, factor * detector.channels) for factor in (1, 2))
    A = literal.LiteralAutoencoder(detector.channels)
    for source, target in ((detector.teacher, T), (detector.student, S), (detector.autoencoder, A)):
        literal.copy_weights(source, target)
        target.to(device)
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimiser = torch.optim.Adam([*S.parameters(), *A.parameters()], **rates)
    mu, sigma = detector.teacher_mean.flatten(), detector.teacher_std.flatten()
    draw = first_draw(trainer).to(device)
    images = to_float(trainer.images[draw.chosen])
    changed = change_colour(images, draw.kinds, draw.factors)

    def steps(count: int = 1) -> float:
        for _ in range(count):
            ones = zip(images.split(1), changed.split(1), draw.natural.split(1), strict=True)
            losses = [literal.training_losses(T, S, A, mu, sigma, *one, settings.hard_quantile) for one in ones]
            optimiser.zero_grad()
            total = sum(one["total"] for one in losses) / len(losses)
            total.backward()
            optimiser.step()
        return total.item()

    return steps


def library_step(trainer: Trainer) -> Callable[[int], float]:
    """Return steps of a training, always with its first draw; the last total loss comes when the device is done."""
    draw = first_draw(trainer).pinned() if trainer.device.type == "cuda" else first_draw(trainer)

    def steps(count: int = 1) -> float:
        for _ in range(count):
            trainer.drawn.clear()
            total = trainer.weighted(trainer.train_step(draw))
        return total.item()

    return steps


def first_draw(trainer: Trainer) -> Draw:
    """Return what the first step of a training draws, without drawing it."""
    before = trainer.generator.get_state()
    draw = next(trainer.draws())
    trainer.generator.set_state(before)
    return draw


def training_table(settings: BenchmarkSettings, literal: ModuleType | None) -> pd.DataFrame:
    """Time one training step of each size and precision, and of the literal algorithm, all in turn in one run.

    Returns for each size, program and precision: median_ms and p99_ms of a step (of the mean of `STEPS`), calls, ratio
    (how much faster than the literal step of the same size), gflop (of the layers, for one step as the literal
    algorithm takes it), share_of_peak (that work by time, by the machine's float32 peak before or after, the better;
    a program that needs less work may exceed 1, as may bfloat16) and first_loss. `attrs` has the peaks of a matrix
    product and of a copy.
    """
    best = peak(pick_device(settings.device), settings.cores)
    torch.set_num_threads(settings.cores)
    calls, work = {}, {}
    with ExitStack() as stack:
        for size in settings.sizes:
            for precision in settings.precisions:
                how = {"precision": precision, **settings.training}
                trainer = stack.enter_context(trainer_of(size, settings.image_size, **how))
                if literal and size != "XS" and (size, "literal", "float32") not in calls:
                    calls[size, "literal", "float32"] = literal_step(literal, trainer)
                calls[size, "effad", precision] = library_step(trainer)
            work[size] = step_flop(trainer.detector, settings.image_size)
        losses = {key: call() for key, call in calls.items()}
        steps = STEPS[trainer.device.type]
        turns = {key: partial(call, steps) for key, call in calls.items()}
        table = measure(turns, seconds=settings.seconds, pause=pause_on([trainer.device.type]))
        table[["median_ms", "p99_ms"]] /= steps
    best = max(best, peak(trainer.device, settings.cores))
    table = table.rename_axis(["size", "program", "precision"]).reset_index()
    slowest = table[table["program"] == "literal"].set_index("size")["median_ms"]
    table["ratio"] = table["size"].map(slowest) / table["median_ms"]
    table["gflop"] = table["size"].map(work) / 1e9
    table["share_of_peak"] = 1e12 * table["gflop"] / table["median_ms"] / best
    table["first_loss"] = list(losses.values())
    table.attrs |= {"peaks": {trainer.device.type: best}, "copy": copy_peak(trainer.device)}
    return table


def step_flop(detector: EfficientAD, size: Size) -> int:
    """Return the floating-point operations of a literal step: two teacher and three student passes, one autoencoder.

    A pass that trains counts three times: forward, and backward to the layer's input and to its weights. That of the
    first layer, whose input needs no gradient, counts so too: half a percent.
    """
    teacher, student, autoencoder = (
        multiply_adds(one, size) for one in (detector.teacher, detector.student, detector.autoencoder)
    )
    return 2 * (2 * teacher + 3 * 3 * student + 3 * autoencoder)


def inference_table(settings: BenchmarkSettings, literal: ModuleType | None) -> pd.DataFrame:
    """Time detection from image tensor to maps and score, batch 1, in every engine: `latency.grid` of these sizes."""
    device = pick_device(settings.device)
    detectors = {size: chance_detector(size, settings.image_size, device) for size in settings.sizes}
    wanted = LatencySettings(
        sizes=settings.sizes,
        image_size=settings.image_size,
        batches=[1] if device.type == "cpu" else [1, 16, 64],
        seconds=settings.seconds,
        longest=60.0,
        threads=settings.threads,
        compiled=settings.sizes if settings.compiled else [],
        exports=settings.exports,
        device=settings.device,
    )
    with tempfile.TemporaryDirectory() as folder:
        return grid(detectors, wanted, folder, literal)


GROWTH = {"images": (10, 100, 1_000, 10_000), "side": (64, 128, 256, 512, 1_024), "batch": (1, 2, 4, 8, 16)}
"""What grows; meanwhile there are 10 images, 64 pixels a side (128 for batches), and a batch of 1."""


def growth_table(settings: BenchmarkSettings) -> pd.DataFrame:
    """Measure what a training costs as its images grow in number and in size, and as its batch does.

    Every case runs in a process of its own, in the first of the precisions, with images made up in memory. Returns a
    row for each size and case: grows, value, start_s (all before the first step: networks, teacher statistics and
    features), step_ms, detect_ms (the same batch) and peak_mb of the process.
    """
    rows = []
    context = multiprocessing.get_context("spawn")
    how = {"precision": settings.precisions[0], **settings.training}
    cases = [(size, grows, value) for size in settings.sizes for grows, values in GROWTH.items() for value in values]
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for size, grows, value in progress(cases, desc="growing"):
            given = {"images": 10, "side": 128 if grows == "batch" else 64, "batch": 1, grows: value}
            found = processes.submit(cost, size, **given, threads=settings.cores, **how).result()
            rows.append({"size": size, "grows": grows, "value": value} | found)
    return pd.DataFrame(rows)


def cost(size: str, *, images: int, side: int, batch: int, threads: int, **how: object) -> dict[str, float]:
    """Return start_s, step_ms, detect_ms and peak_mb of one training; meant for a process of its own.

    `how` are further settings of the training, such as its device. Detection is in float32.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    with trainer_of(size, (side, side), images=images, batch_size=batch, **how) as trainer:
        start = time.perf_counter() - began
        step, detector = library_step(trainer), trainer.detector
        pictures = to_float(trainer.images[torch.arange(batch) % images])

        @torch.inference_mode()
        def detect() -> object:
            return detector.eval()(pictures).score.cpu()

        steps = STEPS[trainer.device.type]
        turns, pause = {("step",): partial(step, steps), ("detect",): detect}, pause_on([trainer.device.type])
        took = measure(turns, seconds=1e-9, pause=pause)["median_ms"]
        memory = torch.cuda.max_memory_allocated() if trainer.device.type == "cuda" else peak_memory()
    return {"start_s": start, "step_ms": took["step"] / steps, "detect_ms": took["detect"], "peak_mb": memory / 1e6}


def tables(settings: BenchmarkSettings) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the wanted tables one after the other, each with its name; `attrs["where"]` names machine and versions."""
    torch.set_num_threads(settings.cores)  # which the device's name tells
    device = pick_device(settings.device)
    where = f"{device_name(device)}, torch {torch.__version__}"
    literal = literal_algorithms()
    work = {"growth": growth_table} if settings.growth else {"training": lambda one: training_table(one, literal)}
    if settings.inference and not settings.growth:
        work["inference"] = lambda one: inference_table(one, literal)
    for name, measured in work.items():
        table = measured(settings)
        peaks = table.attrs.get("peaks", {}).items()
        said = "".join(f", float32 peak {best / 1e9:.0f} GFLOP/s ({kind})" for kind, best in peaks)
        if "copy" in table.attrs:
            said += f", copy {table.attrs['copy'] / 1e9:.0f} GB/s"
        table.attrs["where"] = where + said
        yield name, table
