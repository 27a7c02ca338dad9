"""Verbs that use a run: eval, infer, chat, serve; and data, doctor."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_cli.errors import ConfigError
from lora_cli.spec.checks import at_least, check_seed, positive
from lora_cli.spec.machine import DeviceSpec
from lora_cli.spec.model import ModelSpec
from lora_cli.spec.tasks import TaskSpec
from lora_cli.spec.training import TrainSpec, known_batch

__all__ = ["ChatRun", "DataRun", "DoctorRun", "EvalRun", "InferRun", "RankSpec", "ServeRun", "ServeSpec"]


@dataclass(kw_only=True)
class RankSpec:
    """Which of the ranks of a DyLoRA adapter is used."""

    r: int | None = None
    """Rank up to the trained one, of a run with lora=dylora; None: all of it."""

    def __post_init__(self) -> None:
        at_least("lora.r", self.r, 1, optional=True)


@dataclass(kw_only=True)
class EvalRun:
    """lora eval: score a saved run."""

    run: str = "???"
    """Run folder, unique prefix of its name, latest, or an adapter folder in PEFT format."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """What is scored; the run's own unless given."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model; the run's own unless given."""
    lora: RankSpec = field(default_factory=RankSpec)
    """Which rank is used."""
    device: DeviceSpec = field(default_factory=DeviceSpec)
    """The machine."""
    batch_size: int | None = None
    """Examples per forward pass; None: as the run's own scoring."""
    output: str | None = None
    """Folder for metrics.json and predictions.jsonl; None: eval/<split> in the run."""
    force_base: bool = False
    """Use the adapter even if the base model's fingerprint is not the one it was trained on."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1, optional=True)


@dataclass(kw_only=True)
class InferRun:
    """lora infer: predict with a saved run."""

    run: str = "???"
    """Run folder, unique prefix of its name, latest, or an adapter folder in PEFT format."""
    text: str | None = None
    """A text to predict."""
    prompt: str | None = None
    """A text to answer: written to the terminal as it comes."""
    text_pair: str | None = None
    """Its second text, for tasks on pairs."""
    input: str | None = None
    """File of texts (.txt, .csv, .tsv, .jsonl, .parquet), or - for standard input."""
    output: str | None = None
    """File to write (.jsonl, .csv, .parquet); None: JSON lines on standard output."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """How texts are read; the run's own unless given."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model; the run's own unless given."""
    lora: RankSpec = field(default_factory=RankSpec)
    """Which rank is used."""
    device: DeviceSpec = field(default_factory=DeviceSpec)
    """The machine."""
    batch_size: int | None = None
    """Texts per forward pass; None: as the run's own scoring."""
    seed: int = 0
    """Seed of drawn answers (task.decode.sample=true)."""
    force_base: bool = False
    """Use the adapter even if the base model's fingerprint is not the one it was trained on."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1, optional=True)
        check_seed("seed", self.seed)
        if [self.text, self.prompt, self.input].count(None) != 2:
            ways = 'give one of text="...", prompt="..." and input=FILE (or input=- to read lines)'
            raise ConfigError("text", "", ways)
        if self.prompt is not None and self.output is not None:
            raise ConfigError("prompt", "", "its answer goes to the terminal; give text= with output=")
        if self.text_pair is not None and self.text is None:
            raise ConfigError("text_pair", "", "goes with text=")


@dataclass(kw_only=True)
class ChatRun:
    """lora chat: talk with a saved run."""

    run: str = "???"
    """Run folder, unique prefix of its name, latest, or an adapter folder in PEFT format."""
    system: str | None = None
    """What the assistant is told before the conversation; None: nothing."""
    task: TaskSpec = field(default_factory=TaskSpec)
    """How the conversation is read and answered; the run's own unless given."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model; the run's own unless given."""
    device: DeviceSpec = field(default_factory=DeviceSpec)
    """The machine."""
    seed: int = 0
    """Seed of drawn answers (task.decode.sample=true)."""
    force_base: bool = False
    """Use the adapter even if the base model's fingerprint is not the one it was trained on."""

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


@dataclass(kw_only=True)
class ServeSpec:
    """How adapters are served."""

    host: str = "127.0.0.1"
    """Address to listen on; one that other machines reach needs a token."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    token_file: str | None = None
    """File with the token that every request but those for health has to bear; null: LORA_SERVE_TOKEN, if it is set."""
    max_adapters: int = 64
    """Adapters in memory; the least recently used one leaves for another."""
    max_bytes: int | None = None
    """Bytes that adapters may take in memory beside the base; null: no limit."""
    watch: bool = False
    """Read an adapter anew when its run has saved another one."""
    batch_tokens: int = 4096
    """Tokens computed at once, and, of answers that are being written, kept at once."""
    max_queue: int = 1024
    """Texts that may wait; further requests are answered with 429."""
    max_connections: int = 256
    """Connections at a time; further ones are answered with 503."""
    max_body: int = 1 << 20
    """Bytes of a request; larger ones are answered with 413."""
    max_text: int = 100_000
    """Characters of a request's texts together; longer ones are answered with 413."""
    timeout_s: float = 60.0
    """Seconds that a request may take; then it is answered with 503."""
    grace_s: float = 10.0
    """Seconds that running requests get when the server is stopped."""

    def __post_init__(self) -> None:
        for name in ("max_adapters", "batch_tokens", "max_queue", "max_connections", "max_body", "max_text"):
            at_least(f"serve.{name}", getattr(self, name), 1)
        at_least("serve.max_bytes", self.max_bytes, 1, optional=True)
        if not self.host:
            raise ConfigError(
                "serve.host", "", "needs an address; 127.0.0.1: this machine alone, 0.0.0.0: all others too"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError("serve.port", self.port, "a whole number from 0 to 65535")
        for name in ("timeout_s", "grace_s"):
            positive(f"serve.{name}", getattr(self, name))


@dataclass(kw_only=True)
class ServeRun:
    """lora serve: answer over HTTP, with many adapters on one base."""

    run: str = "???"
    """Runs and adapter folders, or folders of them, with commas between; each is asked for by its folder's name."""
    serve: ServeSpec = field(default_factory=ServeSpec)
    """How they are served."""
    task: TaskSpec | None = None
    """The task of adapters without a run."""
    model: ModelSpec | None = None
    """The base model; the runs' own unless given."""
    device: DeviceSpec = field(default_factory=DeviceSpec)
    """The machine."""
    force_base: bool = False
    """Use adapters even if the base model's fingerprint is not the one they were trained on."""

    @property
    def runs(self) -> list[str]:
        """What `run` names, one by one."""
        return [name.strip() for name in self.run.removeprefix("[").removesuffix("]").split(",") if name.strip()]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("run", self.run, "needs a value: run=a,b or a folder of runs")


@dataclass(kw_only=True)
class DataRun:
    """lora data: look at a data set as the model will see it."""

    task: TaskSpec = field(default_factory=TaskSpec)
    """What is to be learnt."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The base model, of which only tokenizer and config are read."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """The training whose batches are looked at."""
    splits: list[str] | None = None
    """Splits besides train; None: validation, those that a training scores, and test if it can be used."""
    examples: int = 3
    """Training examples to show, drawn by the data seed."""
    seed: int = 0
    """Seed of drawn rows and of the order of examples, unless train.data_seed says otherwise."""
    output: str | None = None
    """JSON file to write the figures to."""

    def __post_init__(self) -> None:
        at_least("examples", self.examples, 0)
        check_seed("seed", self.seed)
        known_batch(self.train, "lora data")

    @property
    def data_seed(self) -> int:
        """Seed of drawn rows and of the order of examples."""
        return self.seed if self.train.data_seed is None else self.train.data_seed


@dataclass(kw_only=True)
class DoctorRun:
    """lora doctor: see what works in this environment, what does not and how to mend it."""

    json: bool = False
    """One JSON object a line instead of a table; --json is the same."""
