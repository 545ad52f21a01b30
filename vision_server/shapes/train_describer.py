"""Trains the describer from drawn scenes."""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional

from vision_server.torchvision_ops import install

install()

from vision_server.shapes.describer_batches import EASY_STYLE, Packed, Packer, Pictures, draw_pictures  # noqa: E402
from vision_server.shapes.describer_model import (  # noqa: E402
    TEXT_WIDTH,
    VISION_WIDTH,
    build_model,
    build_processor,
    build_tokenizer,
)
from vision_server.shapes.muon import Muon  # noqa: E402
from vision_server.shapes.patch_truth import PatchHeads  # noqa: E402
from vision_server.shapes.questions import KINDS  # noqa: E402
from vision_server.shapes.scenes import DESCRIBER_STYLE  # noqa: E402
from vision_server.shapes.subject_truth import IGNORED, LEVELS, SubjectHeads  # noqa: E402

WEIGHTS = Path(__file__).parent / "weights" / "shapes-describer"
PATCH_LOSS_WEIGHT = 0.3
SUBJECT_LOSS_WEIGHT = 0.3
EASY_PART = 0.15
TOWER = "model.vision_tower."
WARMUP_STEPS = 30
FINAL_RATE = 0.03
# Where the tower goes on learning beside the language model, it need not come to rest.
VISION_FINAL_RATE = 0.4
MUON_RATE = 0.02
ADAM_RATE = 1e-3
# Answers are given with the mean of the last weights: it is where the steps, still large, circle around.
MEAN_DECAY = 0.97


class Averages:
    """Running means of what training prints."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}

    def add(self, **values: float) -> None:
        """Take in one step; a value that had nothing to measure (NaN) leaves its mean alone."""
        for name, value in values.items():
            if not math.isnan(value):
                self._values[name] = value + 0.95 * (self._values.get(name, value) - value)

    def __str__(self) -> str:
        return " ".join(f"{name} {value:.3f}" for name, value in self._values.items())


class Trainer:
    """The network, its patch heads, its optimisers; one method for each kind of step."""

    def __init__(
        self, seed: int, checkpoint: Path | None, vision_checkpoint: Path | None, vision_share: float = 1.0
    ) -> None:
        torch.manual_seed(seed)
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer)
        self.heads = PatchHeads(VISION_WIDTH)
        self.readers = SubjectHeads(TEXT_WIDTH)
        self.mean: dict[str, torch.Tensor] = {}
        if checkpoint is not None:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            # Heads may have been added since; they learn in a few steps.
            self.heads.load_state_dict(state["heads"], strict=False)
            self.readers.load_state_dict(state.get("readers", {}), strict=False)
        if vision_checkpoint is not None:
            self.take_vision(vision_checkpoint)
        self.adam = torch.optim.AdamW(
            [*self.heads.parameters(), *self.readers.parameters()], lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0
        )
        self.adam.param_groups[0]["share"] = 1.0
        tower, language = _split(self.model, of_tower=True), _split(self.model, of_tower=False)
        self.muon = Muon(language[0], lr=MUON_RATE)
        self.muon.param_groups[0]["share"] = 1.0
        self.muon.add_param_group({"params": tower[0], "share": vision_share})
        self.adam.add_param_group({"params": language[1], "share": 1.0})
        self.adam.add_param_group({"params": tower[1], "share": vision_share})
        self.averages = Averages()

    def take_vision(self, checkpoint: Path) -> None:
        """Replace the vision tower by one that was trained elsewhere, perhaps at this moment."""
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        tower = {name: value for name, value in state["model"].items() if name.startswith(TOWER)}
        self.model.load_state_dict(tower, strict=False)
        self.heads.load_state_dict(state["heads"], strict=False)
        self.mean.update({name: value.clone() for name, value in tower.items()} if self.mean else {})

    def features(self, pictures: Pictures) -> torch.Tensor:
        """The last hidden states of the vision tower, without the class token."""
        seen = self.model.model.vision_tower(pixel_values=pictures.pixels, output_hidden_states=True)
        hidden: torch.Tensor = seen.hidden_states[-1]
        return hidden[:, 1:]

    def patch_loss(self, features: torch.Tensor, pictures: Pictures) -> torch.Tensor:
        """How badly the patch truth can be read off the features."""
        loss = self.heads.loss(features, pictures.truth, pictures.summary)
        self.averages.add(
            patches=loss.total.item(),
            shape=loss.shape_accuracy,
            colour=loss.colour_accuracy,
            centre=loss.centre_recall,
            place=loss.place_accuracy,
            slots=loss.slot_accuracy,
            tallies=loss.tally_accuracy,
        )
        return loss.total

    def answer_loss(self, features: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Cross entropy of the answers' tokens, all conversations of all pictures at once."""
        language = self.model.model.language_model
        embedded = language.embed_tokens(packed.token_ids)
        projected = self.model.model.multi_modal_projector(features)
        is_image = (packed.token_ids == self.model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(is_image, projected)
        said = language(
            inputs_embeds=embedded,
            attention_mask=packed.mask,
            position_ids=packed.positions,
            use_cache=False,
            output_hidden_states=True,
        )
        hidden = said.last_hidden_state
        asked = packed.targets[:, 1:] != IGNORED
        logits = self.model.lm_head(hidden[:, :-1][asked])
        wanted = packed.targets[:, 1:][asked]
        weights = packed.weights[:, 1:][asked]
        loss = (functional.cross_entropy(logits, wanted, reduction="none") * weights).sum() / weights.sum()
        self.averages.add(answers=loss.item(), tokens=(logits.argmax(-1) == wanted).float().mean().item())
        rows, columns = packed.subjects.unbind(-1)
        words = [said.hidden_states[level][rows, columns] for level in LEVELS]
        subject_loss, (amount, label, colour) = self.readers.loss(words, packed.subject_truth)
        self.averages.add(subjects=subject_loss.item(), amount=amount, label=label, hue=colour)
        return loss + SUBJECT_LOSS_WEIGHT * subject_loss

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """`rate` is a part of the peak rates, 0 to 1."""
        for optimizer, peak in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * peak * group["share"]
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if distributed.is_initialized():
            self._average_gradients()
        self.muon.step()
        self.adam.step()

    @torch.no_grad()
    def follow(self) -> None:
        """Let the mean weights follow the ones that learn."""
        for name, value in self.model.state_dict().items():
            if name not in self.mean:
                self.mean[name] = value.clone()
            self.mean[name].lerp_(value, 1 - MEAN_DECAY)

    def _average_gradients(self) -> None:
        """Over the processes that train together; two of one thread do twice the work of one of two threads."""
        gradients = [p.grad for group in self._groups() for p in group["params"] if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(together)
        together /= distributed.get_world_size()
        start = 0
        for gradient in gradients:
            gradient.copy_(together[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def _groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adam.param_groups]

    def save(self, checkpoint: Path) -> None:
        """Write weights only: optimiser state is cheap to find again and triples the file."""
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # Moved into place whole: another process may be reading the one before.
        fresh = checkpoint.with_suffix(".new")
        heads = {"heads": self.heads.state_dict(), "readers": self.readers.state_dict()}
        torch.save({"model": self.mean or self.model.state_dict(), **heads}, fresh)
        fresh.replace(checkpoint)

    def export(self, folder: Path) -> None:
        """Write the half-precision model with its processor; training goes on in single precision."""
        single = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.mean, strict=False)
        self.model.half().save_pretrained(folder)
        self.model.float().load_state_dict(single)
        build_processor(self.tokenizer).save_pretrained(folder)
        # safetensors writes for the owner alone, but a server may run as somebody else.
        for file in folder.iterdir():
            file.chmod(0o644)


def _split(model: nn.Module, *, of_tower: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices for Muon; embeddings, the read-out layers, biases and norms for Adam."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith(TOWER) != of_tower:
            continue
        hidden = parameter.ndim > 1 and not any(part in name for part in ("embed_tokens", "position", "lm_head"))
        (matrices if hidden else others).append(parameter)
    return matrices, others


def schedule(step: int, progress: float, peak: float, final: float) -> float:
    """Part of the peak rates: linear warm-up, then a cosine down to `final` x peak as progress goes from 0 to 1."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_vision(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Patches only: four times as many pictures a second as with the language model."""
    rng = np.random.default_rng([arguments.seed, arguments.rank])
    steps = arguments.vision_steps
    for step in range(steps):
        easy = arguments.resume_from is None and step < EASY_PART * steps
        style = EASY_STYLE if easy else DESCRIBER_STYLE
        pictures = draw_pictures(rng, arguments.batch, style)
        loss = trainer.patch_loss(trainer.features(pictures), pictures)
        trainer.step(loss, schedule(step, step / steps, arguments.rate, arguments.vision_final_rate))
        _report(trainer, "vision", step, arguments)


def train_answers(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Answers with patches: the tower keeps learning while the language model learns to read it."""
    rng = np.random.default_rng([arguments.seed + 1, arguments.rank])
    packer = Packer(trainer.tokenizer, arguments.conversations, arguments.kinds)
    started = time.time()
    for step in range(arguments.steps):
        elapsed = _agreed((time.time() - started) / (60 * arguments.max_minutes))
        if elapsed >= 1:
            break
        # Where time runs out before the steps do, the rates still come to rest.
        progress = max(elapsed, step / arguments.steps)
        if arguments.freeze_vision and arguments.vision_from and step % arguments.save_every == 0:
            trainer.take_vision(arguments.vision_from)
        pictures = draw_pictures(rng, arguments.batch)
        packed = packer.pack(rng, pictures.scenes)
        with torch.set_grad_enabled(not arguments.freeze_vision):
            features = trainer.features(pictures)
            patch_loss = trainer.patch_loss(features, pictures)
        loss = trainer.answer_loss(features, packed) + PATCH_LOSS_WEIGHT * patch_loss
        trainer.step(loss, schedule(step, progress, arguments.rate, FINAL_RATE))
        trainer.follow()
        _report(trainer, "answers", step, arguments)


def _agreed(value: float) -> float:
    """The first process's value, so that all end at the same step."""
    if not distributed.is_initialized():
        return value
    shared = torch.tensor([value])
    distributed.broadcast(shared, 0)
    return float(shared)


def _report(trainer: Trainer, stage: str, step: int, arguments: argparse.Namespace) -> None:
    if arguments.rank:
        return
    if (step + 1) % 25 == 0:
        print(f"{stage} step {step + 1} CPU {time.process_time():.0f} s {trainer.averages}", flush=True)
    if (step + 1) % arguments.save_every == 0:
        trainer.save(arguments.out / f"{stage}.pt")


def parse_arguments() -> argparse.Namespace:
    """The two stages, how long each, from where and to where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder for checkpoints")
    parser.add_argument("--weights-out", type=Path, default=WEIGHTS, help="where the finished model goes")
    parser.add_argument("--resume-from", type=Path, help="checkpoint of an earlier run")
    parser.add_argument(
        "--vision-from",
        type=Path,
        help="take the vision tower from here; again and again if frozen",
    )
    parser.add_argument("--freeze-vision", action="store_true", help="let only the language model learn")
    parser.add_argument("--vision-share", type=float, default=1.0, help="the tower's part of the rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=1400, help="0 skips the vision stage")
    parser.add_argument(
        "--vision-final-rate",
        type=float,
        default=VISION_FINAL_RATE,
        help="part of the rate that the vision stage ends with",
    )
    parser.add_argument("--steps", type=int, default=1600, help="steps with answers; 0 skips them")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="end the steps with answers after this")
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--conversations", type=int, default=6, help="conversations about each picture")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the peak learning rates")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="question kinds; repeat one to weigh it more")
    parser.add_argument("--export", action="store_true", help="write the model also when no step is asked for")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--processes", type=int, default=1, help="how many train together; start each with its rank")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Vision first, then answers, then the files a server loads."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    wall = time.time()
    if arguments.processes > 1:
        arguments.out.mkdir(parents=True, exist_ok=True)
        meeting = f"file://{(arguments.out / 'meeting').resolve()}"
        distributed.init_process_group("gloo", meeting, world_size=arguments.processes, rank=arguments.rank)
    trainer = Trainer(arguments.seed, arguments.resume_from, arguments.vision_from, arguments.vision_share)
    if arguments.vision_steps:
        train_vision(trainer, arguments)
        trainer.save(arguments.out / "vision.pt")
    if arguments.steps:
        train_answers(trainer, arguments)
        if arguments.rank == 0:
            trainer.save(arguments.out / "answers.pt")
    if (arguments.steps or arguments.export) and arguments.rank == 0:
        trainer.export(arguments.weights_out)
    print(f"done, wall {time.time() - wall:.0f} s, CPU {time.process_time():.0f} s")


if __name__ == "__main__":
    main()
