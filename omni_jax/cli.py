"""`omni-jax`: ask a question, or a folder of them, from the shell.

Answers go to stdout and to files; everything said about them (progress, timings, warnings, errors) goes to stderr.
Exit codes: 0 all well, 1 some rows of a batch failed, 2 it could not be done as asked, 130 interrupted.

Whatever imports JAX is imported inside the functions, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.metadata
import json
import os
import signal
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from omni_jax.config.load import build_config
from omni_jax.errors import ConfigError
from omni_jax.tasks import Task

if TYPE_CHECKING:
    from omni_jax.api import Omni, Options
    from omni_jax.data.shards import CodecSpec as Encoding
    from omni_jax.inference.answer import Reply

RECORDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf")
"""Endings by which `batch` knows the recordings of a folder. A manifest may name files of any ending."""
QUESTIONS = Path(__file__).parent / "assets" / "questions"
"""What `demo` asks."""
DEMO_STEPS = 150
"""Its answers are at most so long: twelve seconds."""
WINDOW = 8
"""Rows per slot that `batch` takes on at a time: what is in memory at once, and what a kill loses at most."""
ANSWERS = "answers.jsonl"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option(help="`nano`, a release folder, or a hub id.", show_default=True)]
Codec = Annotated[Literal["jax", "torch"], typer.Option(help="What turns audio tokens into sound.")]
EightBits = Annotated[
    bool, typer.Option("--int8", help="Decode with weights of eight bits: half the bytes a step; slower on a CPU.")
]
TaskName = Annotated[
    Task | None,
    typer.Option(
        help="What goes in and what comes out: A1 speech or T1 text in; A2 both, T2 text out; A1T1 transcribes, "
        "T1A1 reads aloud. Default: answer in text and speech.",
        case_sensitive=False,
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same answer.")]
MaxSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after so many steps. Default: when the context is full.", show_default=False),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most probable token.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from the k most probable tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(max=1, help="Draw from the fewest tokens that have this probability.")]
Cut = Annotated[bool, typer.Option("--cut", help="Hear the beginning of a recording that is too long.")]
NoParallel = Annotated[
    bool, typer.Option("--no-batch-parallel", help="A1A2: no second row that writes the text and leads.")
]
NoDelay = Annotated[
    bool, typer.Option("--no-enforce-delay", help="Leave it to the model when each audio layer begins.")
]


def _version(wanted: bool) -> None:
    if wanted:
        try:
            version = importlib.metadata.version("omni-jax")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed, run from its source)"
        typer.echo(f"omni-jax {version}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ask a speech-to-speech language model: speech or text in, text and speech out."""


@app.command()
def ask(
    question: Annotated[
        Path | None, typer.Argument(help="A recording: wav, flac, ogg, mp3; any rate.", show_default=False)
    ] = None,
    text: Annotated[str | None, typer.Option(help="Ask this instead of a recording.", show_default=False)] = None,
    task: TaskName = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the spoken answer goes. Default: answer.wav.", show_default=False),
    ] = None,
    model: Model = "nano",
    codec: Codec = "jax",
    seed: Seed = 0,
    max_steps: MaxSteps = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    cut: Cut = False,
    no_batch_parallel: NoParallel = False,
    no_enforce_delay: NoDelay = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Ask one question; the text appears while it is made, the sound is in a wav file."""
    with _plain_errors():
        if (question is None) == (text is None):
            raise ConfigError(f"expected either a recording or --text, found {'neither' if text is None else 'both'}")
        task = task or (Task.T1A2 if question is None else Task.A1A2)
        if task.takes_audio != (question is not None):
            takes, found = ("a recording", "--text") if task.takes_audio else ("--text", "a recording")
            raise ConfigError(f"task {task}: expected {takes}, found {found}")
        if task.outputs_audio:
            out = out or Path("answer.wav")
            _check_out(out, question)
        elif out is not None:
            raise ConfigError(f"--out: task {task} answers in text only, there is no sound to write")
        sound = None
        if question is not None:
            from omni_jax.audio import io as audio_io

            # Read before the model is loaded: a bad file is reported at once.
            sound = audio_io.read_audio(question)

        omni = _load(model, codec)
        options: Options = {
            "max_steps": max_steps,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "enforce_delay": not no_enforce_delay,
            "batch_parallel": not no_batch_parallel,
        }
        rate = audio_io.SAMPLE_RATE if sound is not None else None
        try:
            parts = omni.stream(sound, text=text, task=task, sample_rate=rate, cut=cut, **options)
        except ValueError as error:
            raise _named(error, question) from None
        for part in parts:
            if part.text and not as_json:
                typer.echo(printable(part.text), nl=False)
            reply = part.reply
        assert reply is not None, "a stream ends with the whole answer"
        if task.outputs_text and not as_json:
            typer.echo()
        if task.outputs_audio:
            assert out is not None
            reply.save(out)
        heard = None if sound is None else len(sound) / audio_io.SAMPLE_RATE
        if as_json:
            typer.echo(json.dumps(_as_dict(reply, omni, model, heard, out), ensure_ascii=False))
        else:
            _say(_summary(reply, heard, out))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the spoken answers.")] = Path("demo"),
    model: Model = "nano",
) -> None:
    """Ask the recorded questions that come with the package; print what was heard, answered, and how fast."""
    with _plain_errors():
        from omni_jax.audio import io as audio_io

        rate = audio_io.SAMPLE_RATE
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out: {out}: expected a folder, found {error.strerror}") from None
        questions = {path.name: audio_io.read_audio(path) for path in sorted(QUESTIONS.glob("*.wav"))}
        omni = _load(model, "jax")
        start = time.perf_counter()
        heard = {}
        for name, sound in questions.items():
            heard[name] = omni.transcribe(sound, sample_rate=rate, max_steps=DEMO_STEPS).text
            # The timings of a first answer would be those of the compiler.
            for _ in omni.stream(sound, sample_rate=rate, max_steps=DEMO_STEPS):
                pass
        _say(f"compiled, and everything asked once, in {time.perf_counter() - start:.1f} s")
        for name, sound in questions.items():
            typer.echo(f"\n{name}, {len(sound) / rate:.1f} s of speech")
            typer.echo(f"  heard:    {printable(heard[name])}")
            typer.echo("  answered: ", nl=False)
            for part in omni.stream(sound, sample_rate=rate, max_steps=DEMO_STEPS):
                typer.echo(printable(part.text), nl=False)
            assert part.reply is not None, "a stream ends with the whole answer"
            reply, timing = part.reply, part.reply.timing
            file = out / name
            reply.save(file)
            typer.echo(f"\n  spoken:   {file}, {reply.seconds:.1f} s of speech")
            if timing.first_sound is not None and timing.real_time_factor is not None:
                typer.echo(
                    f"  timings:  first sound after {timing.first_sound:.2f} s, all of it after {timing.total:.2f} s: "
                    f"{timing.real_time_factor:.2f} x the duration of the sound"
                )


@app.command()
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST.jsonl|FOLDER",
            help="JSON lines with id, audio or text, and optionally task, cut and the options of this command; or a "
            "folder of recordings.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help=f"The folder that {ANSWERS} and the wavs go to.", show_default=False)],
    task: TaskName = None,
    model: Model = "nano",
    codec: Codec = "jax",
    int8: EightBits = False,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Rows answered at once, by each process.")] = 8,
    tensor: Annotated[int, typer.Option(min=1, help="Chips that share the work on a row.")] = 1,
    process: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of this one of --processes; hosts of a TPU slice know it.", show_default=False
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many share the rows, each started by itself.", show_default=False)
    ] = None,
    seed: Seed = 0,
    max_steps: MaxSteps = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    cut: Cut = False,
    no_batch_parallel: NoParallel = False,
    no_enforce_delay: NoDelay = False,
) -> None:
    """Answer many questions; run again, it goes on where it stopped and tries failed rows once more."""
    with _plain_errors():
        defaults: dict[str, Any] = {
            "task": task,
            "cut": cut,
            "max_steps": max_steps,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "enforce_delay": not no_enforce_delay,
            "batch_parallel": not no_batch_parallel,
        }
        rows = _read_folder(source, out) if source.is_dir() else _read_manifest(source)
        rows = _not_over_questions(rows, out)
        share = _share(process, processes)
        answers = Answers(out, *share)

        def load() -> Omni:
            return _load(model, codec, int8=int8, mesh=_chips(tensor, slots))

        identity = _identity(model) + " int8" * int8
        failed = _run_batch(rows[share[0] :: share[1]], answers, defaults, load, identity, codec=codec, slots=slots)
        raise typer.Exit(1 if failed else 0)


@app.command()
def serve(
    model: Model = "nano",
    codec: Codec = "jax",
    int8: EightBits = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other machines reach only another one.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Requests answered at once.")] = 8,
    waiting: Annotated[int, typer.Option(min=0, help="How many more may be queued; others get status 429.")] = 64,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A key on each line; one of them must be given then. Default: none is asked for."),
    ] = None,
    max_audio_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Longest question. Default: what the model hears at once.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request.")] = 32 << 20,
    max_seconds: Annotated[float, typer.Option(min=1, help="After which a request is given up.")] = 120.0,
    idle_seconds: Annotated[float, typer.Option(min=1, help="How long a client may send or read nothing.")] = 30.0,
) -> None:
    """Talk over the network: a page, OpenAI's and Mini-Omni's endpoints, a WebSocket, figures for Prometheus."""
    with _plain_errors():
        from omni_jax.serve import malloc

        malloc.keep_flat()
        keys = _read_keys(api_key_file) if api_key_file is not None else ()
        omni = _load(model, codec, int8=int8)
        from omni_jax.serve.app import make_server
        from omni_jax.serve.sessions import Service, Settings

        settings = Settings(slots, waiting, max_audio_seconds, max_body_bytes, max_seconds, idle_seconds, keys)
        name = Path(model).name or model
        if not keys and host not in ("127.0.0.1", "localhost", "::1"):
            _say(f"note: anybody who reaches {host}:{port} may ask; --api-key-file asks for a key")
        make_server(Service(omni, name, settings), host, port).run()


RUNNER = typer.Option(
    help="Do it as an Apache Beam pipeline on this runner: DirectRunner (here, by --workers processes), "
    "DataflowRunner, FlinkRunner, SparkRunner. Corpus and records are on a file system that all workers share.",
    show_default=False,
)
RUNNER_OPTIONS = typer.Argument(help="After --: the runner's own, e.g. -- --project=P --region=R.", show_default=False)


class Corpus(enum.StrEnum):
    """What `prepare` can read."""

    voice_assistant = "voice_assistant"
    librispeech = "librispeech"
    libritts = "libritts"
    vctk = "vctk"
    mls = "mls"
    text = "text"
    manifest = "manifest"


@app.command()
def prepare(
    corpus: Annotated[
        Corpus,
        typer.Argument(
            help="voice_assistant: parquet of VoiceAssistant-400K; librispeech, libritts, vctk, mls: as unpacked; "
            "text: questions and answers in JSON lines, parquet or a datasets folder, in columns of Open-Orca, Alpaca, "
            "Moss or plain ones; manifest: JSON lines of our own."
        ),
    ],
    path: Annotated[Path, typer.Argument(help="Its folder, or file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder of records to write, or to go on with.", show_default=False)],
    codec: Annotated[
        str | None, typer.Option(help="The model whose codec encodes answers that are sound.", show_default=False)
    ] = None,
    as_answer: Annotated[
        bool, typer.Option("--as-answer", help="Read speech is to be read aloud, not written down; takes --codec.")
    ] = False,
    persona: Annotated[
        bool, typer.Option("--persona", help="Keep the rows of VoiceAssistant-400K that teach another's name.")
    ] = False,
    max_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="Longest recording. Default: 15 s of a question, 30 s read.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Of a text or manifest, for the index.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    runner: Annotated[str | None, RUNNER] = None,
    runner_options: Annotated[list[str] | None, RUNNER_OPTIONS] = None,
) -> None:
    """Turn a corpus into records to train on; run again, it goes on where it stopped and adds nothing twice."""
    with _plain_errors():
        from omni_jax.data import sources
        from omni_jax.data.shards import CodecSpec as Encoding

        if as_answer and codec is None:
            raise ConfigError("--as-answer: expected --codec, to encode the answers by")
        encoder = None if codec is None else Encoding(codec)
        rate = encoder.config.sample_rate if encoder else 24_000
        source: sources.Source
        if corpus is Corpus.voice_assistant:
            size = encoder.config.codebook_size if encoder else 4096
            source = sources.VoiceAssistant(path, persona, max_seconds or sources.MAX_QUESTION_SECONDS, size)
        elif corpus is Corpus.text:
            source = sources.TextQA(path, license=license or "unknown")
        elif corpus is Corpus.manifest:
            source = sources.Manifest(path, rate, max_seconds or 60.0, license=license or "unknown")
        else:
            listing, known = sources.SPEECH_CORPORA[corpus]
            source = sources.ReadSpeech(path, str(corpus), known, listing, as_answer, rate, max_seconds or 30.0)
        _prepare_all(source, out, encoder, workers, _beam(runner, workers, runner_options))


@app.command()
def synthesize(
    text: Annotated[
        Path, typer.Argument(help="Questions and answers in writing: as `prepare text` reads them.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of records to write, or to go on with.", show_default=False)],
    codec: Annotated[str, typer.Option(help="The model whose codec encodes the answers.", show_default=False)],
    questions: Annotated[
        list[str] | None,
        typer.Option(
            help="Who asks; may be repeated, one is drawn for each question: espeak, flite, hibari or pico, perhaps "
            "with =VOICE,...; command='PROGRAM {text} {out}'; openai='URL MODEL', the last two perhaps with "
            "' @VOICE,...'.",
            show_default=False,
        ),
    ] = None,
    answer: Annotated[
        str, typer.Option(help="Who answers: named likewise; the first voice is taken.")
    ] = "hibari=heart",
    seed: Annotated[int, typer.Option(help="Of voices, pace, pitch, rooms and noise.")] = 0,
    clean: Annotated[bool, typer.Option("--clean", help="Questions without rooms and noise.")] = False,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest question.")] = 30.0,
    license: Annotated[str, typer.Option(help="Of the text, for the index.")] = "unknown",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    runner: Annotated[str | None, RUNNER] = None,
    runner_options: Annotated[list[str] | None, RUNNER_OPTIONS] = None,
) -> None:
    """Give questions and answers their voices; run again, it goes on where it stopped."""
    with _plain_errors():
        from omni_jax.data import sources
        from omni_jax.data.shards import CodecSpec as Encoding
        from omni_jax.data.spoken_corpus import SpokenCorpus
        from omni_jax.data.synthesizers import VoiceSpec

        encoder = Encoding(codec)
        asking = tuple(VoiceSpec.parse(name) for name in questions or ["espeak", "flite"])
        who = VoiceSpec.parse(answer)
        for voices in (*asking, who):
            # What is not installed is missed now, not in every row.
            unknown = set(voices.voices) - set(voices.open().voices())
            if unknown:
                raise ConfigError(f"{voices.synthesizer}: expected its voices, found {', '.join(sorted(unknown))}")
        source = sources.TextQA(text, license=license)
        voiced = SpokenCorpus(source, asking, who, encoder.config.sample_rate, seed, not clean, max_seconds)
        _prepare_all(voiced, out, encoder, workers, _beam(runner, workers, runner_options))


def _beam(runner: str | None, workers: int, options: list[str] | None) -> list[str] | None:
    """Options of the Beam pipeline that is asked for, if one is."""
    if runner is None:
        if options:
            raise ConfigError(f"expected --runner before options for it, found {' '.join(options)}")
        return None
    here = ["--direct_running_mode=multi_processing", "--default_sdk_harness_log_level=ERROR"]
    direct = [f"--direct_num_workers={workers}", *(here if workers > 1 else ())] if runner == "DirectRunner" else []
    return [f"--runner={runner}", *direct, *(options or ())]


def _prepare_all(source: Any, out: Path, codec: Encoding | None, workers: int, beam: list[str] | None) -> None:
    """Write the records, and say what became of the rows."""
    from tqdm import tqdm

    from omni_jax.data.prepare import prepare

    with tqdm(unit="part", file=sys.stderr, dynamic_ncols=True) as bar:

        def progress(done: int, parts: int) -> None:
            bar.total = parts
            bar.update(done - bar.n)

        index = prepare(source, out, codec=codec, workers=workers, beam=beam, progress=progress)
    _say(f"{out}: {index['exchanges']} exchanges, {index['question_hours']} h of questions")
    for reason, count in index["rejected"].items():
        _say(f"left out, {reason}: {count}; for example {index['rejected_examples'][reason][0]}")


class Suite(enum.StrEnum):
    """What `evaluate` can read."""

    manifest = "manifest"
    librispeech = "librispeech"
    voicebench = "voicebench"
    uro_bench = "uro_bench"
    open_audio_bench = "open_audio_bench"


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(help="A manifest, or the folder of a benchmark.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for results, report and spoken answers.", show_default=False)],
    suite: Annotated[Suite, typer.Option(help="How it is laid out.")] = Suite.manifest,
    model: Model = "nano",
    codec: Codec = "jax",
    int8: EightBits = False,
    listener: Annotated[
        str,
        typer.Option(help="Who hears the spoken answers: none, faster-whisper=MODEL or command='PROGRAM {audio}'."),
    ] = "none",
    against: Annotated[
        Path | None, typer.Option(help="Another evaluation's folder, to compare with.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first so many.", show_default=False)] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Cases answered at once.")] = 8,
    max_steps: MaxSteps = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    no_batch_parallel: NoParallel = False,
) -> None:
    """Measure a model: what it understands, answers and says, and how fast, with intervals; a report to listen to."""
    with _plain_errors():
        from tqdm import tqdm

        from omni_jax.evaluation import asr_judge, report, suites
        from omni_jax.evaluation.run import Evaluation
        from omni_jax.evaluation.run import evaluate as measure

        cases = suites.read(suite, path)[:limit]
        who = asr_judge.parse_judge(listener)
        other = None if against is None else Evaluation.load(against)
        omni = _load(model, codec, int8=int8)
        options: Options = {
            "max_steps": max_steps,
            "temperature": temperature,
            "seed": seed,
            "batch_parallel": not no_batch_parallel,
        }
        omni.prepare({"text": "a"}, **options)
        with tqdm(total=len(cases), unit="case", file=sys.stderr, dynamic_ncols=True) as bar:
            found = measure(
                omni, cases, out, model=model + " in 8 bits" * int8, suite=f"{suite} {path.name}", listener=who,
                options=options, slots=slots, progress=bar.update,
            )  # fmt: skip
        report.write(found, out, other)
        typer.echo(report.markdown(found, other), nl=False)
        _say(f"the report is {out / 'report.html'}")


@app.command("compile")
def compile_command(
    program: Annotated[
        Literal["train", "prefill", "decode", "batch", "codec"],
        typer.Argument(help="batch: decode with a second row for each request, as offline answers are made."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="field=value of the configuration, e.g. mesh.fsdp=256")
    ] = None,
    *,
    topology: Annotated[str, typer.Option(help="A slice of TPUs: v5e:1x1, v5e:16x16, v5p:4x4x4, v6e:4x4, ...")],
    model: Annotated[str, typer.Option(help="A preset.")] = "mini_omni",
    config: Annotated[
        Path | None, typer.Option(help="The configuration of a run, for train.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows over all chips. Default: the configuration's, or one a group.")
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Chips that share a row; train: see the configuration.")] = 1,
    int8: EightBits = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Ask the TPU compiler, without a TPU, what a program needs: memory, bytes, and the least time."""
    with _plain_errors():
        # Nothing runs: the chips need not be there, and if they are, another process may be using them.
        os.environ["JAX_PLATFORMS"] = "cpu"
        from omni_jax import config as configs
        from omni_jax.compile_report.report import examine
        from omni_jax.compile_report.topology import Topology

        run = None
        if overrides and config is None:
            raise ConfigError(f"expected --config before fields of it, found {' '.join(overrides)}")
        if config is not None:
            run = configs.load(configs.RunConfig, config, overrides or ())
            if program == "train" and not run.start.startswith("preset:"):
                # Shapes are all that is needed, and the weights of an earlier stage need not be here.
                run = dataclasses.replace(run, start=f"preset:{model}")
        report = examine(
            program, Topology.parse(topology), model=model, config=run, batch=batch, tensor=tensor, int8=int8
        )
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(report)))
        else:
            typer.echo(report.table())


def _read_keys(path: Path) -> tuple[str, ...]:
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: expected a readable text file, found {error}") from None
    if not keys:
        raise ConfigError(f"--api-key-file {path}: expected a key on each line, found none")
    return keys


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ManifestRow:
    """One line of a manifest. What is not given comes from the command line."""

    id: StrictStr = Field(min_length=1)
    """Unique in the manifest."""
    audio: StrictStr | None = None
    """A recording, relative to the manifest."""
    text: StrictStr | None = None
    task: Literal["A1A2", "A1T2", "A1T1", "T1A2", "T1T2", "T1A1"] | None = None
    cut: StrictBool | None = None
    max_steps: StrictInt | None = None
    temperature: StrictFloat | None = None
    top_k: StrictInt | None = None
    top_p: StrictFloat | None = None
    seed: StrictInt | None = None
    enforce_delay: StrictBool | None = None
    batch_parallel: StrictBool | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch: what was asked for, or why that is not known."""

    id: str | None
    place: str
    """Where it stands, for messages."""
    wav: str = ""
    """File name of its spoken answer."""
    audio: Path | None = None
    given: ManifestRow | None = None
    error: str = ""

    def settings(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Its task, cut and options: its own, else the command line's."""
        assert self.given is not None
        own = {name: getattr(self.given, name) for name in defaults}
        return {name: defaults[name] if value is None else value for name, value in own.items()}

    def fingerprint(self, settings: dict[str, Any], model: str, codec: str) -> str:
        """Tells whether an answer written earlier is the answer to the same request, to the same `_identity`."""
        assert self.given is not None
        try:
            sound = hashlib.sha256(self.audio.read_bytes()).hexdigest() if self.audio else None
        except OSError:
            sound = None
        request = [sound, self.given.text, settings, model, codec]
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


class Answers:
    """The folder a batch writes to: one JSON line per row, one wav per spoken answer.

    A row's wav is there, whole, before its line is. A half-written line, as a kill leaves it, is dropped. Of several
    processes each has a file of lines of its own.
    """

    def __init__(self, folder: Path, process: int = 0, processes: int = 1):
        self.folder = folder
        self.path = folder / _answers_file(process, processes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            others = {path.name for path in folder.glob(f"{Path(ANSWERS).stem}*.jsonl")}
            others -= {_answers_file(number, processes) for number in range(processes)}
            if others:
                raise ConfigError(
                    f"{folder}: expected answers of {processes} processes or none, found {min(others)}: go on with as "
                    "many processes as before, or choose another --out"
                )
            if processes == 1:
                # What a kill in the middle of `wav.write` leaves.
                for left_over in folder.glob(".*.wav.????????.part"):
                    left_over.unlink()
            lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"{error.filename}: expected a folder to write to, found {error.strerror}") from None
        self.earlier: dict[str, dict[str, Any]] = {}
        for line in lines:
            try:
                record = json.loads(line)
                if "error" not in record:
                    self.earlier[record["id"]] = record
            except (ValueError, KeyError, TypeError):
                continue

    def done(self, row: Row, fingerprint: str) -> dict[str, Any] | None:
        """The answer of an earlier run to the same request, if it is complete."""
        record = self.earlier.get(row.id or "")
        if record is None or record.get("request") != fingerprint:
            return None
        return record if record.get("audio") is None or (self.folder / record["audio"]).is_file() else None

    def write_all(self, records: Sequence[dict[str, Any]]) -> None:
        """Replace the file, whole or not at all."""
        partial = self.path.with_name(f".{self.path.name}.part")
        partial.write_bytes(b"".join(_line(record) for record in records))
        partial.replace(self.path)

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is with the system when this returns."""
        with self.path.open("ab") as file:
            file.write(_line(record))


def _answers_file(process: int, processes: int) -> str:
    return ANSWERS if processes == 1 else f"{Path(ANSWERS).stem}-{process:05d}-of-{processes:05d}.jsonl"


def _share(process: int | None, processes: int | None) -> tuple[int, int]:
    """Which of how many processes this is: as told, as a TPU slice knows it, or the only one."""
    if process is not None or processes is not None:
        if process is None or processes is None or process >= processes:
            raise ConfigError(f"expected --process below --processes, found {process} and {processes}")
        return process, processes
    from omni_jax.sharding import on_pod

    if not on_pod():
        return 0, 1
    import jax

    jax.distributed.initialize()
    return jax.process_index(), jax.process_count()


def _chips(tensor: int, slots: int) -> Any:
    """The mesh of this process's chips, of which each group of `tensor` shares rows; None if there is only one."""
    import jax

    from omni_jax.sharding import make_mesh

    chips = jax.local_devices()
    groups = len(chips) // tensor
    if groups * tensor != len(chips):
        raise ConfigError(f"--tensor: expected a divisor of the {len(chips)} chips here, found {tensor}")
    if slots % groups:
        raise ConfigError(f"--slots: expected a multiple of the {groups} groups of chips here, found {slots}")
    return make_mesh(groups, 1, tensor, chips) if len(chips) > 1 else None


def _run_batch(
    rows: Sequence[Row],
    answers: Answers,
    defaults: dict[str, Any],
    load: Callable[[], Omni],
    identity: str,
    *,
    codec: Any,
    slots: int,
) -> int:
    """Answer the rows that have no answer yet; how many failed."""
    from tqdm import tqdm

    records: dict[int, dict[str, Any]] = {}
    asked: dict[int, tuple[dict[str, Any], str]] = {}
    for index, row in enumerate(rows):
        if row.error:
            continue
        settings = row.settings(defaults)
        asked[index] = settings, row.fingerprint(settings, identity, codec)
        if record := answers.done(row, asked[index][1]):
            records[index] = record
    kept = len(records)
    omni = None
    if kept < len(asked):
        omni = load()
        # The command line's own options are checked once, not reported in every row.
        options = {name: value for name, value in defaults.items() if name not in ("task", "cut")}
        omni.prepare({"text": "a"}, **options)

    # Answers to other requests go now, not before it is sure that this run can start.
    answers.write_all([records[index] for index in sorted(records)])
    failed = 0
    waiting = [index for index in range(len(rows)) if index not in records]
    with tqdm(total=len(rows), initial=kept, unit="row", file=sys.stderr, dynamic_ncols=True) as bar:
        for start in range(0, len(waiting), WINDOW * slots):
            window = waiting[start : start + WINDOW * slots]
            requests: dict[int, Any] = {}
            errors = {index: rows[index].error for index in window if rows[index].error}
            for index in window:
                if index in errors:
                    continue
                assert omni is not None
                try:
                    requests[index] = _prepare_row(omni, rows[index], asked[index][0])
                except _user_errors() as error:
                    errors[index] = str(_named(error, rows[index].audio))
            replies = {}
            if requests:
                assert omni is not None
                replies = dict(zip(requests, omni.run(list(requests.values()), slots), strict=True))
            for index in window:
                row = rows[index]
                record = {"id": row.id}
                if index in errors:
                    record["error"] = errors[index]
                    failed += 1
                else:
                    reply = replies.pop(index)
                    if reply.audio is not None:
                        reply.save(answers.folder / row.wav)
                    record |= _answer(reply, row, asked[index][1])
                answers.append(record)
                records[index] = record
                bar.update()
    # A row that failed earlier and was tried again stands at the end so far.
    answers.write_all([records[index] for index in range(len(rows))])
    _say(
        f"{len(rows)} rows: {len(waiting) - failed} answered, {kept} from an earlier run, {failed} failed; "
        f"see {answers.path}"
    )
    return failed


def _prepare_row(omni: Omni, row: Row, settings: dict[str, Any]) -> Any:
    from omni_jax.api import Request

    assert row.given is not None
    options: Any = {name: value for name, value in settings.items() if name not in ("task", "cut")}
    return omni.prepare(Request(row.audio, row.given.text, settings["task"], None, settings["cut"], options))


def _answer(reply: Reply, row: Row, fingerprint: str) -> dict[str, Any]:
    return {
        "task": str(reply.task),
        "text": reply.text,
        "audio": None if reply.audio is None else row.wav,
        "seconds": None if reply.audio is None else round(reply.seconds, 4),
        "finish_reason": reply.finish_reason,
        "num_invalid_codes": reply.num_invalid_codes,
        "request": fingerprint,
    }


def _read_folder(folder: Path, out: Path) -> list[Row]:
    """A row per recording, sorted by name. Its id is its name without the ending; with it, if two would be alike."""
    if folder.resolve() == out.resolve():
        raise ConfigError(f"--out: expected another folder than that of the questions, found {out}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in RECORDINGS and path.is_file())
    if not files:
        raise ConfigError(f"{folder}: expected recordings ({', '.join(RECORDINGS)}), found none")
    stems = [path.stem for path in files]
    ids = [path.name if stems.count(path.stem) > 1 else path.stem for path in files]
    rows = zip(ids, files, strict=True)
    return _distinct([Row(id, path.name, "", path, ManifestRow(id, audio=path.name)) for id, path in rows])


def _read_manifest(path: Path) -> list[Row]:
    """A row per line that is not blank; a line that cannot be used becomes a row that says why."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: expected a manifest or a folder, found {error.strerror}") from None
    rows = [_read_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path}: expected a manifest of JSON lines, found an empty file")
    return _distinct(rows)


def _read_row(path: Path, number: int, line: bytes) -> Row:
    place = f"{path.name} line {number}"
    try:
        values = json.loads(line)
    except ValueError as error:
        return Row(None, place, error=f"{place}: expected a JSON object, found {error}")
    id = values.get("id") if isinstance(values, dict) else None
    id = id if isinstance(id, str) else None
    try:
        given = build_config(ManifestRow, values, place)
        if (given.audio is None) == (given.text is None):
            found = "neither" if given.text is None else "both"
            raise ConfigError(f"{place}: expected either audio or text, found {found}")
        audio = None if given.audio is None else path.parent / given.audio
        if audio is not None:
            try:
                audio.resolve()
            except (OSError, ValueError) as error:
                message = f"{place}: audio: expected the path of a file, found {given.audio!r}: {error}"
                raise ConfigError(message) from None
    except ConfigError as error:
        return Row(id, place, error=str(error).replace("\n", "; "))
    return Row(id, place, "", audio, given)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Give each row a wav file of its own; a second row of the same id becomes an error.

    Names are told apart regardless of case, because some file systems do not know it.
    """
    first: dict[str, str] = {}
    names: set[str] = set()
    return [_distinct_row(row, first, names) for row in rows]


def _distinct_row(row: Row, first: dict[str, str], names: set[str]) -> Row:
    if row.id is None or row.error:
        return row
    if row.id in first:
        error = f"{row.place}: id {row.id!r} was used before, by {first[row.id]}"
        return Row(row.id, row.place, error=error)
    first[row.id] = row.place
    from omni_jax.file_names import safe_file_name

    name = safe_file_name(row.id)
    if name.casefold() in names:
        name = safe_file_name(row.id, tell_apart=True)
    names.add(name.casefold())
    return dataclasses.replace(row, wav=f"{name}.wav")


def _not_over_questions(rows: Sequence[Row], folder: Path) -> list[Row]:
    """Refuse rows whose spoken answer would replace a recording that some row asks."""
    questions = {row.audio.resolve(): row.audio for row in rows if row.audio}
    result = []
    for row in rows:
        question = questions.get((folder / row.wav).resolve()) if row.wav else None
        if question is not None:
            error = f"{row.place}: its answer would replace the recording {question}: choose another --out or id"
            row = Row(row.id, row.place, error=error)
        result.append(row)
    return result


def printable(text: str) -> str:
    """Text without the control characters that a terminal would obey."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def _line(record: dict[str, Any]) -> bytes:
    # Ids from JSON may hold lone surrogates, which only ASCII escapes can carry.
    text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def _check_out(out: Path, question: Path | None) -> None:
    """Find out before the answer is made that it could not be written."""
    if out.is_dir():
        raise ConfigError(f"--out {out}: expected a file to write to, found a folder")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a file in an existing folder, found no folder {out.parent}")
    if question is not None and out.exists() and question.exists() and out.samefile(question):
        raise ConfigError(f"--out {out}: expected another file than the question")


def _identity(model: str) -> str:
    """Tells models apart: a release by its content, since another may come to stand in the same folder."""
    from omni_jax.checkpoint.release import find_release

    release = find_release(model)
    return model if release is None else release.fingerprint()


def _load(model: str, codec: Any, *, int8: bool = False, mesh: Any = None) -> Omni:
    """Load a model, and say so; that it is untrained too."""
    _say(f"loading {model} ...")
    start = time.perf_counter()
    from omni_jax.api import Omni
    from omni_jax.errors import UntrainedWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UntrainedWarning)
        omni = Omni.load(model, codec=codec, int8=int8, mesh=mesh)
    for warning in caught:
        _say(f"note: {warning.message}")
    _say(f"loaded in {time.perf_counter() - start:.1f} s")
    return omni


def _as_dict(reply: Reply, omni: Omni, model: str, heard: float | None, out: Path | None) -> dict[str, Any]:
    timing = reply.timing
    return {
        "text": reply.text,
        "task": str(reply.task),
        "model": model,
        "trained": omni.trained,
        "finish_reason": reply.finish_reason,
        "steps": reply.tokens.shape[1],
        "num_invalid_codes": reply.num_invalid_codes,
        "question_seconds": heard,
        "answer_seconds": None if reply.audio is None else reply.seconds,
        "out": None if reply.audio is None else str(out),
        "first_token_seconds": timing.first_token,
        "first_sound_seconds": timing.first_sound,
        "total_seconds": timing.total,
        "steps_per_second": timing.steps_per_second,
        "real_time_factor": timing.real_time_factor,
        "tokens": reply.tokens.tolist(),
    }


FINISH = {
    "stop": "came to its end",
    "length": "stopped at --max-steps",
    "context": "stopped because the context is full",
}


def _summary(reply: Reply, heard: float | None, out: Path | None) -> str:
    timing = reply.timing
    asked = "text" if heard is None else f"{heard:.2f} s of speech"
    lines = [
        f"{reply.task}: {asked} in, {reply.tokens.shape[1]} steps; the answer {FINISH[reply.finish_reason]}",
        f"first token after {timing.first_token:.2f} s",
    ]
    if timing.first_sound is not None:
        lines[-1] += f", first sound after {timing.first_sound:.2f} s"
    lines[-1] += f", all after {timing.total:.2f} s ({timing.steps_per_second:.1f} steps/s"
    if timing.real_time_factor is not None:
        lines[-1] += f", {timing.real_time_factor:.2f} x the duration of the sound"
    lines[-1] += ")"
    if reply.audio is not None:
        lines.append(f"{reply.seconds:.2f} s of sound in {out}")
    if reply.num_invalid_codes:
        lines.append(f"{reply.num_invalid_codes} audio tokens were no codes; the code before was played")
    return "\n".join(lines)


def _say(message: str) -> None:
    typer.echo("\n".join(f"omni-jax: {line}" for line in message.splitlines()), err=True)


def _named(error: Exception, file: Path | None) -> Exception:
    """The error with the name of its file in front, if it has none, and options as the shell spells them."""
    message = str(error).replace("cut=True", "--cut")
    if file is not None and str(file) not in message:
        message = f"{file}: {message}".replace(": array:", ":")
    return type(error)(message)


def _user_errors() -> tuple[type[Exception], ...]:
    """What is raised when something asked for cannot be done; anything else is a fault of ours."""
    from omni_jax.errors import AudioError, CheckpointError, SynthesisError

    return AudioError, CheckpointError, ConfigError, SynthesisError


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Report what cannot be done in words, with exit code 2."""
    try:
        yield
    except Exception as error:
        missing_extra = isinstance(error, ImportError) and "omni-jax[" in str(error)
        if not (missing_extra or isinstance(error, _user_errors())):
            raise
        _say(str(error))
        raise typer.Exit(2) from None


def _keep_compiled_programs() -> None:
    """Let JAX keep what it compiles in the user's cache folder, so that the next run need not compile it again.

    JAX's own variables come first: JAX_COMPILATION_CACHE_DIR names another folder, empty means none. Nothing is kept
    for virtual CPU devices: read back, a program of several has forgotten the order of its collectives and can wait
    for itself for ever (jax 0.10.2).
    """
    virtual = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or virtual:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "omni_jax" / "compiled"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if os.access(cache, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _look_for_no_chips_in_vain() -> None:
    """Keep JAX from starting libtpu on a machine without chips, where it is installed for `compile` alone.

    It would go on with the CPU all the same, after several lines about what it could not find.
    """
    if not any(found for name in ("accel*", "vfio/*", "nvidia*", "kfd") for found in Path("/dev").glob(name)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main() -> None:
    """The entry point of `omni-jax`."""
    # Ctrl-C ends the process there and then, as the shell's 130. Python's own handler would wait for a compilation
    # to end and raise in whatever JAX was doing, which may swallow it. Nothing is lost: files appear whole or not
    # at all.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _keep_compiled_programs()
    _look_for_no_chips_in_vain()
    for stream in (sys.stdout, sys.stderr):
        # An answer in any script must not fail on a terminal that knows only some.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app(prog_name="omni-jax")


if __name__ == "__main__":
    main()
