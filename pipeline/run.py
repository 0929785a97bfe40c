"""The whole run on one screen: read, prepare, generate, finish, commit.

    units --read--> INPUT --prepare--> PREPARED --generate--> GENERATED --finish, commit--> parts

Ray Data carries the rows as far as GENERATED. This process, which holds the lease on the output,
gathers them into units and commits each unit once.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from ray.data import ActorPoolStrategy

from model.engine.config import EngineConfig
from model.inputs.images import DecodeLimits
from model.inputs.turning import Turner
from pipeline.attempts import Climb
from pipeline.canary import CanarySettings
from pipeline.commit import Committer
from pipeline.documents import write_documents
from pipeline.estimate.estimate import foretold
from pipeline.estimate.gpus import mean_tokens
from pipeline.estimate.lists import foretold_of_lists
from pipeline.generate import Generate, GenerateSettings
from pipeline.gpus import gpus_of
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.metrics import RunMetrics
from pipeline.model import Model, model_folder, model_revision, open_model
from pipeline.placement import Placement, configure_ray_data, place, ray_session
from pipeline.plan import Plan
from pipeline.prepare import BLOCK_BYTES, Prepare, PrepareSettings
from pipeline.progress import Progress, endings
from pipeline.read import ReadSettings, read_settings, read_units
from pipeline.run_book import RunBook, SharedBook
from pipeline.sources import Source, open_source
from pipeline.stop import Stop
from pipeline.tally import Tally
from schemas.job import Job
from schemas.ledger import PLAN, Growth, UnitKind
from schemas.report import Foretold, Summary

PREPARE_ROWS = 8
RETRIES = 5  # of a batch whose worker or replica died under it, before the run stops


def run(job: Job) -> Summary:
    """Does what is left of a job, and returns once every planned unit is committed.

    Raises ConfigError for all that a user can get wrong, before any model is loaded; EngineError
    or LedgerError when the run stops before its end. The same call resumes it.
    """
    model = open_model(job)
    source = open_source(job.source, job.endpoint_url)
    read = read_settings(job, source, model.page_settings(job))
    ledger = Ledger(job.output, job.endpoint_url)
    ledger.prepare()
    progress = Progress()
    with Stop(job.grace_seconds, progress.stopping) as stop, Lease(ledger) as lease, progress:
        tally = Tally(progress)
        tally.growth = plan_or_resume(job, source, ledger, lease, tally.noted)
        committer = Committer(ledger, lease)
        pending = committer.add_empty(pa.concat_tables([PLAN.empty_table(), *ledger.pending()]))
        if pending.num_rows:
            tally.foretold = _foretold(job, model, source, ledger, pending, progress)
            progress.start(pending.num_rows, "starting Ray, loading the model, first answers")
            read = replace(read, kept=ledger.kept)
            with tally.recorded(ledger, lease.run):
                work(job, model, read, pending, committer, tally, stop)
        write_documents(job, ledger, source)
        return tally.summary(ledger, committer, job.strict)


def work(
    job: Job,
    model: Model,
    read: ReadSettings,
    pending: pa.Table,
    committer: Committer,
    tally: Tally,
    stop: Stop,
) -> None:
    """Sends units through all the stages. Raises StoppedError when it ends before they are done."""
    with ray_session(job.address):
        stop.listen()
        book = RunBook(committer.ledger)
        prompt_tokens = tally.foretold.mean_prompt_tokens if tally.foretold else 0.0
        placement = place(job, has_documents(pending, tally.foretold))
        flow = Flow(job, model, read, placement, book.shared(), prompt_tokens)
        tally.hardware = flow.place.hardware()
        tally.metrics = RunMetrics(job.output)
        with gpus_of(flow.place, book.starting, tally.waits):
            for rows in stop.relay(flow.generated(pending), committer.incomplete):
                tally.generated(rows)
                with tally.committing():
                    works = committer.add(rows)
                tally.committed(works, begun=len(committer.incomplete()))
                tally.replicas(book.news(), book.restarts)
                tally.check_failures(job.max_failure_rate)
        tally.replicas(book.news(at_once=True), book.restarts)
    tally.check_stopped(stop.asked)


def plan_or_resume(
    job: Job,
    source: Source,
    ledger: Ledger,
    lease: Lease,
    note: Callable[[Iterable[str]], None],
) -> Growth | None:
    """Opens the plan; what it grew by if the job says so and there was one already. `note` is told
    what is odd where a run begins. Raises ConfigError if OUT holds another job."""
    fingerprint = job.fingerprint(model_revision(job))
    planned = ledger.resume(fingerprint)
    if not planned:
        plan = Plan.of(job, source)
        ledger.create(job, fingerprint, plan, lease.run)
        note(_oddities(plan, ledger))
    ledger.clean_up()
    return ledger.grow(job, source) if planned and job.grow else None


def _oddities(plan: Plan, ledger: Ledger) -> Iterator[str]:
    """What a user may not have meant, though a run goes well with it."""
    if plan.unread:
        yield f"not read, for their names: {endings(plan.unread)}"
    if ledger.foreign:
        yield (
            f"{ledger.output} holds other files too, such as {ledger.foreign}: pyarrow and pandas"
            " take every file of a folder for rows, so OUT is better a folder of its own"
        )


def _foretold(
    job: Job, model: Model, source: Source, ledger: Ledger, pending: pa.Table, progress: Progress
) -> Foretold | None:
    """What a plan says of this run, for the report; it may cost nothing but a few seconds."""
    try:
        if UnitKind.LIST.value in pending["kind"].unique().to_pylist():
            return foretold_of_lists(job, model, ledger, pending)
        progress.phase = "reading headers, to foretell the run"
        return foretold(job, model, source, ledger, pending)
    except Exception:  # whatever it is, the run itself will meet it and say so
        return None


def has_documents(units: pa.Table, foretold: Foretold | None) -> bool:
    """Whether reading the units, in the PLAN schema, takes rendering pages. A look into some of
    them told so, or names do: of files, of addresses, of the members of tars to do again."""
    if foretold and foretold.pages:
        return True
    if UnitKind.DOCUMENTS.value in units["kind"].unique().to_pylist():
        return True
    kinds = pa.array([UnitKind.LIST, UnitKind.TAR])
    named = units.filter(pc.is_in(units["kind"], kinds))  # pyright: ignore
    names = named["names"].combine_chunks().flatten()
    found = pc.match_substring_regex(names, r"(?i)\.(pdf|tiff?)($|[?#])")  # pyright: ignore
    return bool(found.true_count)


@dataclass(frozen=True)
class Flow:
    """The stages that run on Ray, and what each of them must know."""

    job: Job
    model: Model
    read: ReadSettings
    place: Placement
    book: SharedBook
    prompt_tokens: float  # of a row, on average; 0 where that is not known

    def generated(self, pending: pa.Table) -> Iterator[pa.Table]:
        """GENERATED rows of the pending units, as they come, in any order."""
        configure_ray_data(BLOCK_BYTES)
        units = ray.data.from_arrow(pending).repartition(target_num_rows_per_block=1)
        inputs = units.map_batches(
            partial(read_units, settings=self.read),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=self.place.read_cpus,
        )
        prepared = inputs.map_batches(
            Prepare,
            fn_constructor_args=(self.prepare_settings(),),
            batch_size=PREPARE_ROWS,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=self.place.prepare_workers),
            num_cpus=self.place.prepare_cpus,
            max_task_retries=RETRIES,
        )
        generated = prepared.map_batches(
            Generate,
            fn_constructor_args=(self.generate_settings(),),
            batch_size=self.place.batch_rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=self.place.replicas,
                max_concurrent_calls_per_actor=self.place.calls,
                enable_true_multi_threading=True,
            ),
            num_cpus=0,
            num_gpus=self.place.gpus,
            max_task_retries=RETRIES,
        )
        yield from generated.iter_batches(batch_size=None, batch_format="pyarrow")

    def prepare_settings(self) -> PrepareSettings:
        job, config = self.job, self.model.config
        # A rendered page is no larger than its pixels, but may be larger than a small document.
        max_bytes = max(job.max_bytes, 4 * job.max_pixels)
        return PrepareSettings(
            template=self.model.template,
            pinpoints=config.pinpoints,
            tile=config.vision.image_size,
            patch=config.vision.patch_size,
            limits=DecodeLimits(job.max_pixels, max_bytes, job.decode_seconds),
            exif_rotate=job.exif_rotate,
            skip_blank=job.skip_blank,
            kept=self.read.kept,
            trial=replace(self.read.pages, page_seconds=job.decode_seconds),
        )

    def generate_settings(self) -> GenerateSettings:
        job = self.job
        engine = EngineConfig(
            checkpoint=model_folder(job),
            ranks=job.pp,
            device=self.place.device,
            dtype=job.dtype,
            quantization=job.quantization,
            random_weights=job.random_weights,
            threads=self.place.threads,
            chunk_tokens=self.place.chunk_tokens,
            max_sequences=self.place.max_sequences,
            tokens_per_sequence=mean_tokens(self.prompt_tokens, job),
            cache_bytes=None if job.cache_gib is None else int(job.cache_gib * 1024**3),
        )
        config = self.model.config
        turner = Turner(
            self.model.template,
            config.pinpoints,
            config.vision.image_size,
            config.vision.patch_size,
        )
        return GenerateSettings(
            engine=engine,
            sampling=job.sampling(),
            tile=config.vision.image_size,
            kept=self.read.kept,
            extraction=job.extraction(),
            climb=Climb(job.ladder, job.retries, turner),
            dedupe=job.dedupe == "exact",
            # What 80 layers of random weights answer, the rounding of bfloat16 decides.
            canary=None if job.random_weights else self.canary_settings(engine),
            book=self.book,
            hosts=self.place.hosts,
        )

    def canary_settings(self, engine: EngineConfig) -> CanarySettings:
        config, hardware = self.model.config, self.place.hardware()
        dtype = str(engine.torch_dtype).removeprefix("torch.")
        ranks = f"pp {engine.ranks}" if engine.ranks > 1 else ""  # they share prompts out otherwise
        return CanarySettings(
            template=self.model.template,
            pinpoints=config.pinpoints,
            tile=config.vision.image_size,
            patch=config.vision.patch_size,
            dtype=dtype,
            kind=" ".join(filter(None, (hardware.device, hardware.gpu, dtype, ranks))),
        )
