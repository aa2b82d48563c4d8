"""Executes stages by identity: the only place where a study meets training and evaluation."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, assert_never

import torch

from midstream.config import ContinuedCosine, Machine
from midstream.config.training import check_start
from midstream.core.identity import FORMAT_VERSION, digest, kept_digests
from midstream.core.storage import remove_folder
from midstream.core.tokens import TokenCount
from midstream.cost.pictures import choice_for, feature_folder, feature_plan
from midstream.data.feature_store import FeatureStore, StoredImages, unchanged
from midstream.data.images import Encode, LiveImages, encode_fixed
from midstream.data.prepare import (
    prepare_tokenizer,
    prepare_world,
    prepare_world_source,
    tokenizer_path,
)
from midstream.data.rows import Images, NoImages, RowDataset, plan_rows
from midstream.launch.local import require_trackers
from midstream.model.weights import initialise
from midstream.order.plan import DOCUMENT_ROWS
from midstream.study.lease import progress_event
from midstream.study.results import RESULTS, SourceResult, StageResult, checked
from midstream.study.stages import (
    Continue,
    Evaluate,
    Finetune,
    FromScratch,
    FuseEncoders,
    LoadDecoder,
    LoadEncoder,
    LoadModel,
    PrepareSource,
    PrepareTokenizer,
    PrepareWorld,
    Pretrain,
    Ranked,
    Stage,
    Trained,
    TrainEncoder,
    came_from,
    overflow_of,
)
from midstream.study.store import Ledger, OpenStage, Stopped
from midstream.train import checkpoint
from midstream.train.contrastive import train_encoder
from midstream.train.guards import Watch
from midstream.train.held_out import Planned, held_out_rows, plan_held_out
from midstream.train.loop import Interrupted, Job, Start, train
from midstream.train.metrics import Report, Tracking, tracking_of
from midstream.train.parallel import ALONE, data_workers, forget_peak, peak_memory, set_up
from midstream.train.step import build_model
from midstream.work.choices import machine_for, place_for, too_large
from midstream.work.evaluate_stage import encoder_stage, evaluate_stage, imported_stage, scores_of
from midstream.work.open_model import (
    on_device,
    open_encoder,
    open_sources,
    open_tokenizer,
    weights_folder,
    world_root,
)


class StageRunner:
    """Runs stages in this process; `report` gets progress, `should_stop` is asked between steps.

    `lost` gets the reason where a rank is lost; the process then ends.
    """

    def __init__(
        self,
        ledger: Ledger,
        machine: Machine,
        report: Report,
        should_stop: Callable[[], bool],
        lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.ledger, self.machine, self.features = ledger, machine, machine.features
        self.should_stop = should_stop
        self._tell = report
        self._opened: OpenStage | None = None
        self._tracking: Tracking | None = None
        self.place = set_up(machine)
        self.device = self.place.device
        if self.place.rank == 0:
            require_trackers(machine)
        if self.place.note is not None and self.place.rank == 0:
            print(self.place.note, file=sys.stderr)
        self.watch = Watch(self.place, machine.rank_timeout_seconds, lost)

    def run(self, stage: Stage) -> dict[str, Any]:
        """Execute one stage whose parents are done; returns its results.

        Every rank of a training stage calls it; the first alone opens the stage and writes what
        the ledger keeps. Raises Stopped after a checkpoint when asked to stop; ValueError if the
        folder's lock is held, FileNotFoundError if a parent is not done.
        """
        started = time.monotonic()
        forget_peak(self.place.device)
        self.watch.rest("opening the stage")
        for parent in stage.parents:
            self.ledger.result(parent, StageResult)
        with ExitStack() as held:
            opened = self._opened = self._open(stage, held)
            try:
                results = self._tracked(stage)
            except Interrupted as reason:
                raise Stopped(str(reason)) from None
            except Exception as error:
                if told := self.watch.failed(error):
                    raise RuntimeError(told) from error
                raise
            finally:
                self.watch.rest()
            computes = isinstance(stage, Ranked | TrainEncoder)
            memory = peak_memory(replace(self.place, scalars=None) if computes else ALONE)
            measured = {"seconds": time.monotonic() - started, **memory}
            whole = _checked(stage, measured | results)
            if opened is not None:
                opened.finish(whole)
        return whole

    def report(self, values: dict[str, Any]) -> None:
        """Tell how far the stage is, and keep it in its folder."""
        self._tell(values)
        if self._opened is not None:
            self._opened.progress.note(values)

    def _tracked(self, stage: Stage) -> dict[str, Any]:
        """Execute with the machine's trackers; `tracking` says which of them failed, if any did."""
        self._tracking = None
        if self._opened is not None and isinstance(stage, Ranked | TrainEncoder):
            about, folder = stage.model_dump(mode="json"), self._opened.folder
            self._tracking = tracking_of(self.machine, folder, stage.name, stage.kind, about)
        if self._tracking is None:
            return self._execute(stage)
        try:
            results = self._execute(stage)
        except BaseException as error:
            self._tracking.close(not isinstance(error, Interrupted))
            raise
        troubles = self._tracking.close(False)
        return results | ({"tracking": troubles} if troubles else {})

    def close(self) -> None:
        """After the last stage: this rank leaves the others in peace."""
        self.watch.close()
        self.place.close()

    def _open(self, stage: Stage, held: ExitStack) -> OpenStage | None:
        """The stage, opened by the first rank; the others wait for it, or hear why not."""
        refused: Exception | None = None
        opened = None
        if self.place.rank == 0:
            try:
                opened = held.enter_context(self.ledger.open_stage(stage))
            except (ValueError, OSError) as error:
                refused = error
        if isinstance(stage, Ranked):
            told = self.place.gather(None if refused is None else str(refused))[0]
            if told is not None and refused is None:
                raise ValueError(told)
        if refused is not None:
            raise refused
        return opened

    def _execute(self, stage: Stage) -> dict[str, Any]:
        folder = self.ledger.folder(stage)
        match stage:
            case PrepareWorld():
                self._note(0.0, "writing the world")
                return prepare_world(stage.world, folder)
            case PrepareTokenizer() | PrepareSource():
                return self._prepare(stage, folder)
            case TrainEncoder():
                name = stage.training.source
                source = open_sources(stage.data, [name], self.ledger)[name]
                codec = open_tokenizer(stage.data, self.ledger)
                return train_encoder(
                    stage.encoder,
                    stage.training,
                    source,
                    codec,
                    folder,
                    self.device,
                    report=self.report,
                    should_stop=self.should_stop,
                    tracking=self._tracking,
                )
            case LoadEncoder() | FuseEncoders():
                return encoder_stage(stage, self.ledger)
            case LoadDecoder() | LoadModel():
                return imported_stage(stage, self.ledger)
            case Pretrain() | Continue() | Finetune():
                return self._train(stage)
            case Evaluate():
                return self._evaluate(stage)
            case _:
                assert_never(stage)

    def _prepare(self, stage: PrepareTokenizer | PrepareSource, folder: Path) -> dict[str, Any]:
        root = world_root(stage, self.ledger)
        with kept_digests(self.ledger.digests):
            if isinstance(stage, PrepareTokenizer):
                return prepare_tokenizer(
                    stage.tokenizer, stage.world, root, stage.trained_on, folder
                )
            file = tokenizer_path(self.ledger.folder(stage.tokenizer))
            workers, note = self.machine.workers, self._note_or_stop
            return prepare_world_source(
                stage.world, root, stage.source, file, folder, workers=workers, progress=note
            )

    def job(self, stage: Trained, folder: Path) -> Job:
        """What a training stage trains, into `folder`; its parents are done."""
        names = stage.training.budget.source_names
        sources = open_sources(stage.data, names, self.ledger)
        patches, training = stage.model.image_tokens, stage.training
        # What cannot start is refused before pictures are encoded for it.
        start = self._start(stage)
        check_start(training.schedule, start.parent_rate, stage.name)
        budget, rows, seed = training.budget, training.rows, training.seed
        whole, overflow = stage.model.num_patches, overflow_of(stage)
        plan = plan_rows(sources, patches, budget, rows, seed, overflow, whole)
        if training.freeze_decoder and not any(sources[name].num_images for name in plan.names):
            raise ValueError(
                f"{stage.name} keeps the decoder frozen and shows no picture, so it would learn "
                f"nothing; {', '.join(plan.names)} hold none: add a source that does"
            )
        codec = open_tokenizer(stage.data, self.ledger)
        held = plan_held_out(sources, training, patches)
        (images, *others), encode = self._seeing(stage, [(plan, sources), *held])
        dataset = RowDataset(plan, sources, patches, images)
        self.place = place_for(stage, self.machine, self.place)
        model = build_model(stage.model, training, self.place)
        initialise(model, training.seed)
        return Job(
            model=model,
            training=training,
            dataset=dataset,
            encode=encode,
            start=start,
            folder=folder,
            milestones=stage.milestones if isinstance(stage, Pretrain) else (),
            looks=encode is not unchanged,
            origin=self._origin(stage),
            held_out=held_out_rows(held, others, patches, codec),
        )

    def _train(self, stage: Trained) -> dict[str, Any]:
        folder = self.ledger.folder(stage)
        job, machine = self.job(stage, folder), self.machine_for(stage)
        try:
            results = train(
                job,
                machine,
                self.place,
                report=self.report,
                should_stop=self.should_stop,
                watch=self.watch,
                tracking=self._tracking,
            )
        except torch.OutOfMemoryError as error:
            raise too_large(stage, machine, error) from error
        if not isinstance(stage, Pretrain):
            progress = checkpoint.Progress(
                step=results["steps"],
                tokens_seen=results["tokens_seen"],
                total_tokens=results["tokens_seen"],
                rate=results["last_rate"],
                counts=TokenCount(**results["tokens"]),
            )
            checkpoint.save(folder / "weights", job.model, None, progress, place=self.place)
        if self.place.rank == 0:
            remove_folder(folder / "checkpoints")
        return results

    def machine_for(self, stage: Trained) -> Machine:
        """The machine, with what it leaves open chosen for the stage."""
        return machine_for(stage, self.ledger, self.machine, self.place)

    def _origin(self, stage: Trained) -> dict[str, str]:
        """What the stage's checkpoints are of."""
        names = stage.training.budget.source_names
        read = {n: self.ledger.result(stage.data.source(n), SourceResult) for n in names}
        found = {
            "format": str(FORMAT_VERSION),
            "stage": stage.identity,
            "rows of a step": str(stage.training.rows.batch_rows),
            "model": digest(stage.model),
            "data": digest({name: source.fingerprint for name, source in read.items()}),
        }
        documents = any(source.kind == "interleaved" for source in read.values())
        return found | ({"rows of documents": str(DOCUMENT_ROWS)} if documents else {})

    def _start(self, stage: Trained) -> Start:
        """What a stage begins from; the schedule's position comes with the checkpoint."""
        if isinstance(stage, Pretrain):
            return Start()
        owned = stage.model.owns_encoder and stage.encoder_stage is not None
        held = stage.encoder_stage.encoder if stage.encoder_stage is not None else None
        found = came_from(stage)
        if found is None:
            return Start(encoder=self._encoder_weights(stage) if owned else None, held=held)
        before, share = found
        had = before.model.owns_encoder
        folder = weights_folder(self.ledger, before, share)
        start = Start(
            folder=folder,
            parts=("decoder",),
            encoder=self._encoder_weights(stage) if owned and not had else None,
            moments=_moments(stage),
            held=before.model.encoder if had else held,
        )
        if start.moments == "carry" and checkpoint.stored_file(folder, "optimizer") is None:
            raise FileNotFoundError(
                f"{folder} holds no optimiser state to carry; choose optimizer='fresh'"
            )
        if isinstance(before, LoadModel | Continue):
            others = {"encoder": had, "gated": before.model.projector.gated is not None}
            carried = (name for name, is_there in others.items() if is_there)
            start = replace(start, parts=("decoder", "projector", *carried))
            if not isinstance(stage.training.schedule, ContinuedCosine):
                return start
        return replace(start, parent_rate=checkpoint.read_progress(folder).rate)

    def _encoder_weights(self, stage: Continue | Finetune) -> Path:
        assert stage.encoder_stage is not None, "a patch projection has no weights before"
        folder = self.ledger.folder(stage.encoder_stage) / "weights"
        checkpoint.check_files(folder, place=self.place)
        return folder

    def _evaluate(self, stage: Evaluate) -> dict[str, Any]:
        results = evaluate_stage(
            stage,
            self.ledger,
            self.place,
            should_stop=self.should_stop,
            at=self.watch.at,
            note=self._note,
        )
        if self._tracking is not None:
            self._tracking.begin()
            self._tracking.log(scores_of(results), prefix="score")
        return results

    def _seeing(
        self, stage: Trained, plans: Sequence[Planned]
    ) -> tuple[list[Images], Encode | None]:
        """What the pictures of each plan's rows become while they are loaded, and on the device."""
        if isinstance(stage, Pretrain):
            return [NoImages() for _ in plans], unchanged
        config = stage.model.encoder
        assert config is not None, "an image-text stage sees"
        if config.kind == "patches" or stage.model.owns_encoder:
            return [LiveImages(seen, plan.names, config) for plan, seen in plans], None
        assert stage.encoder_stage is not None, "it is a frozen one"
        encoder = open_encoder(self.ledger, stage.encoder_stage, config, place=self.place)
        encode = on_device(encoder.to(self.device).eval())
        # Another stage may store features meanwhile: what one rank sees of them goes for all.
        if self.place.gather(self._decide(stage))[0] == "live":
            live = partial(encode_fixed, encode, config=config)
            return [LiveImages(seen, plan.names, config) for plan, seen in plans], live
        folder = feature_folder(self.ledger, stage.encoder_stage, config)
        assert folder is not None, "a parent of the stage"
        store = FeatureStore(folder, config)
        self.place.barrier()  # one that opens slowly is not behind those that store
        self.watch.at("storing features")
        fill = partial(
            store.fill,
            encode=encode,
            progress=self._note,
            # Each rank goes by batches of its own, and a signal may reach one of them alone.
            should_stop=lambda: self.watch.any_stops(self.should_stop()),
            share=(self.place.rank, self.place.world_size),
            workers=data_workers(self.machine, self.device),
        )
        shown = [
            (plan.examples_of(at), seen[n])
            for plan, seen in plans
            for at, n in enumerate(plan.names)
        ]
        filled = all(fill(source, examples) for examples, source in shown if source.num_images)
        if not all(self.place.gather(filled)):
            raise Interrupted("asked to stop while features were stored; those so far are kept")
        return [StoredImages(store, seen, plan.names) for plan, seen in plans], unchanged

    def _decide(self, stage: Continue | Finetune) -> str:
        if self.features != "auto":
            return self.features
        chosen = choice_for(stage, feature_plan([stage], self.ledger, self.machine))
        assert chosen is not None
        return chosen.decision

    def _note_or_stop(self, done: float, note: str) -> None:
        """As `_note`, for work that keeps what it has finished wherever it is ended."""
        if self.should_stop():
            raise Interrupted("asked to stop; what it had finished is kept")
        self._note(done, note)

    def _note(self, done: float, note: str) -> None:
        self.report(progress_event(0, 0, None, 0.0) | {"done": done, "note": note})


def _checked(stage: Stage, results: dict[str, Any]) -> dict[str, Any]:
    """What goes into `results.json`, once it is what the readers are told of this kind."""
    unknown = checked(RESULTS[stage.kind], results, Path(stage.name)).unknown_keys()
    assert not unknown, f"study/results.py does not name {unknown} of {stage.kind}"
    return results


def _moments(stage: Continue | Finetune) -> Literal["carry", "fresh", "warm"]:
    """Whether Adam's moments come along; image-text stages keep none of theirs."""
    start = stage.start
    return "fresh" if isinstance(start, Continue | LoadModel | FromScratch) else start.optimizer
