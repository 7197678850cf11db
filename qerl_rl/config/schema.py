"""Every key of a launch file, with its type, unit and default.

A launch file is these dataclasses written as YAML. `loader.load_config` builds a `Config` from it; nothing mutates it
afterwards. Sizes that follow from several keys are properties, with the unit in their name.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qerl_rl.config.ascend_schema import AscendConfig
from qerl_rl.config.learning_schema import (
    AlgorithmConfig,
    CriticConfig,
    DpoConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutCorrectionConfig,
)
from qerl_rl.config.mindspeed_schema import MindSpeedConfig
from qerl_rl.config.profiler_schema import ProfilerConfig
from qerl_rl.config.router_schema import RouterConfig


@dataclass(frozen=True)
class RunConfig:
    """One run: where it writes, how long it goes, what makes it repeatable."""

    name: str = "qerl_rl"
    output_dir: str = "outputs/run"
    seed: int = 1
    steps: int = 10
    deterministic: bool = False
    """Repeat a run bit for bit on the same devices, with operators and collectives that do (docs/determinism.md)."""


@dataclass(frozen=True)
class ClusterConfig:
    """The Ray cluster and the worker processes on it."""

    address: str = ""
    """Ray cluster to join: `auto` for the one this machine belongs to, or host:port (where that cluster checks tokens,
    Ray's default, also set RAY_AUTH_MODE=token); empty starts Ray on this machine."""
    workers: int = 2
    """Processes that train and roll out; one a card."""
    cpus_per_worker: int = 1
    threads_per_worker: int = 1
    """OMP_NUM_THREADS of a worker; more than its cores makes both engines erratic."""
    placement: str = "PACK"
    """Ray placement strategy of the workers: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every worker process."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Folder with the HF config, the tokenizer and the (quantized) safetensors."""
    max_length: int = 512
    """Tokens of prompt and response together."""
    provider: str = "megatron"
    """Whose patches Megatron's model gets on NPUs: megatron (MindSpeed's own) or mindspeed_llm (MindSpeed-LLM's)."""
    share_base: str = "auto"
    """auto (a process stores frozen weights once where both engines can read one layout of them) or never."""


@dataclass(frozen=True)
class TrainConfig(RouterConfig):
    """The Megatron engine. Parallel sizes multiply as in Megatron: workers = tensor x pipeline x data."""

    device: str = "auto"
    """auto, cpu, cuda, npu, or npu-sim (torch_npu on this machine's CPU: docs/simulated_npu.md)."""
    dtype: str = "float32"
    """float32 or bfloat16: the type of activations and of weights that are not quantized."""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    sequence_parallel: bool = True
    """Splits activations along the sequence where tensor_parallel > 1 (Megatron demands it for MoE)."""
    layers_per_stage: str = ""
    """Layers of each pipeline stage, N,N,..., where not all are alike; only the first and the last may differ."""
    token_dispatcher: str = "alltoall"
    """alltoall, allgather or alltoall_seq (docs/routing.md): how tokens reach the ranks of their experts."""
    recompute: str = "none"
    """none, full (every layer again in backward) or selective (attention and experts)."""
    recompute_method: str = "uniform"
    """With full: uniform (all layers, recompute_layers of them from one stored input) or block (only that many)."""
    recompute_layers: int = 1
    micro_batch_tokens: int = 2048
    """Tokens packed into one micro-batch of a rank (a single longer sample still makes one)."""
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    mindspeed: MindSpeedConfig = field(default_factory=MindSpeedConfig)

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """layers_per_stage as numbers; none where all stages are alike."""
        return tuple(int(count) for count in self.layers_per_stage.split(",") if count.strip().isdecimal())


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM engine. workers = tensor_parallel x data_parallel."""

    tensor_parallel: int = 1
    data_parallel: int = 2
    expert_parallel: bool = True
    """Experts are split over all ranks of tensor_parallel x data_parallel; otherwise over tensor_parallel only."""
    dtype: str = "bfloat16"
    max_sequences: int = 128
    """Sequences decoded at once by one engine."""
    max_batched_tokens: int = 4096
    """Tokens that one step of an engine computes, of all sequences; at least model.max_length, but with
    chunked_prefill."""
    chunked_prefill: bool = False
    """Compute a prompt over several steps where rollout.max_batched_tokens does not hold all of it."""
    kv_cache_bytes: int = 67108864
    """KV cache of one rank, in bytes."""
    kv_cache_dtype: str = "auto"
    """auto (rollout.dtype); fp8, fp8_e4m3 or fp8_e5m2 (CPU, CUDA); int8 (NPU, of a checkpoint that has the scales)."""
    kv_block_tokens: int = 128
    """Tokens in a block of the KV cache; prefixes are found in it by whole blocks. A CPU takes multiples of 32."""
    prefix_caching: bool = True
    enforce_eager: bool = True
    """Capture no graphs; on NPUs rollout.ascend.graph_mode says which are captured otherwise."""
    ascend: AscendConfig = field(default_factory=AscendConfig)
    """What only vllm-ascend knows."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    """Tokens with less than this share of the likeliest one's probability are left out; 0 keeps every token."""
    max_prompt_tokens: int = 128
    max_response_tokens: int = 128
    carry_prompts: int = 0
    """Prompts in flight beyond algorithm.prompts_per_step (partial rollout): a step's rollout ends when as many groups
    as it learns from are done, and the others go on in the next step from where they are. 0 waits for all."""
    carry_max_age: int = 1
    """Steps that a group may be carried over; the step after those waits for it."""
    ahead: bool = False
    """Sample the next step's responses while this step trains (one step off-policy); neither engine leaves memory."""


@dataclass(frozen=True)
class SwapConfig:
    """What leaves memory when the other engine has the card, how weights move, and how what arrived is checked.

    A check that runs `first` runs at the first swap of each process: at a run's start, and after each resume.
    """

    offload_parameters: bool = True
    offload_gradients: bool = True
    offload_optimizer: bool = True
    release_kv_cache: bool = True
    release_weights: bool = False
    """The engine's weights leave memory as well while the trainer has the card, and are read back for the rollout."""
    bucket_bytes: int = 67108864
    """Most bytes that one rank sends and receives in one collective; a swap takes twice as much memory for staging."""
    checksum: str = "first"
    """Compare a sum of what the trainer sent with one of what each engine got: never, first or always."""
    canary: str = "first"
    """Let both engines score the same tokens after a swap and compare their log-probs: never, first or always."""
    canary_tolerance: float = 0.0
    """Mean |difference| of those log-probs, in nats a token, from which on the swap counts as broken; 0 takes one that
    fits how weights are rounded (docs/resharding.md)."""


@dataclass(frozen=True)
class QuantConfig:
    """How the base weights are stored; the checkpoint must agree. With lora.rank=0 the checkpoint is not quantized, and
    this is what the rollout engine rounds the trained weights to."""

    format: str = "w8a8"
    """w8a8, w4a16, w4a8, nvfp4, mxfp4, mxfp8 or none; docs/quantization.md says what each stores, and what runs it."""
    group_size: int = 0
    """With lora.rank=0: weights of a row that share a scale, where the format has a choice; 0 takes its own, -1 is the
    whole row."""


@dataclass(frozen=True)
class NoiseConfig:
    """Adaptive quantization noise on the engine's RMSNorm weights (QeRL, arXiv 2510.11696)."""

    enabled: bool = False
    sigma_start: float = 1e-2
    sigma_end: float = 1e-4
    stages: int = 10
    """Equal parts of run.steps; the first has no noise, then sigma goes from sigma_start to sigma_end."""
    schedule: str = "exponential"
    """How it goes there: exponential (QeRL), linear, cosine, logarithmic, or constant (sigma_start throughout)."""
    exempt_router: bool = False
    """Keep the noise out of what routers see: tokens go to the experts that they would go to without noise."""
    log_probs: str = "clean"
    """Weights that the trainer takes old log-probs at: clean, or noisy as in the engine. With noisy the ratio to the
    old policy is the one to what sampled; it costs one more pass, which tells noise/kl from the engines' mismatch."""


@dataclass(frozen=True)
class LoraConfig:
    """The adapters: the only weights that train over a quantized base."""

    rank: int = 16
    """0 has none: every weight trains (docs/full_training.md), and the other keys of this section have no effect."""
    alpha: float = 32.0
    attention: bool = True
    experts: bool = True
    shared_experts: bool = True
    """Of families that have them."""
    in_rollout: str = "auto"
    """How the engine applies them: adapter (beside its weights), merge (into its weights, quantized again), or auto
    (adapter wherever its kernels let one act inside an expert)."""
    merge_rounding: str = "stochastic"
    """How a merged weight is rounded to its format: stochastic (right on average, however small the change) or nearest
    (loses what is below half a step of the grid)."""


@dataclass(frozen=True)
class RouterReplayConfig:
    """Which experts the trainer's routers choose for the tokens of a rollout (names as in verl)."""

    mode: str = "disabled"
    """disabled (their own choice) or R3 (those that the engine chose, in old and reference log-probs and in updates;
    how much each counts stays the trainer's). docs/router_replay.md says when the choice is their own all the same."""

    @property
    def is_on(self) -> bool:
        return self.mode != "disabled"


@dataclass(frozen=True)
class DataConfig:
    train_path: str = ""
    """A .jsonl or .json file, one object a line; a .parquet, .arrow or .csv file; the name of a data set on the Hugging
    Face hub, such as openai/gsm8k; a function of yours, package.module.function, called with (this section, split);
    the prefix of prompts that MindSpeed-RL has tokenized (PREFIX_packed_input_ids_document.bin and the rest); or
    `arithmetic` for generated sums."""
    subset: str = ""
    """Configuration of a data set of the hub (`main` for openai/gsm8k); empty takes its default one."""
    split: str = "train"
    """Split of a data set of the hub to train on."""
    prompt_field: str = "prompt"
    prompt_template: str = ""
    """The prompt as text with the names of fields in braces, such as `Question: {question}`; {{ and }} are braces.
    Empty takes data.prompt_field as it is."""
    answer_field: str = "answer"
    chosen_field: str = "chosen"
    """The better response of a pair, in dpo, which has no answers."""
    rejected_field: str = "rejected"
    """The worse response of a pair, in dpo."""
    chat_template: bool = False
    """Wrap the prompt as a user message in the tokenizer's chat template."""
    system_prompt: str = ""
    instruction: str = ""
    """Text appended to every prompt."""
    answer_after: str = ""
    """Keep of the answer field only what follows this mark, as `####` in GSM8K; empty keeps all of it."""
    max_prompt_tokens: int = 0
    """Leave out prompts of more tokens, template included; 0 leaves none out, and one beyond
    rollout.max_prompt_tokens is an error."""
    shuffle: bool = True
    limit: int = 0
    """Use only the first lines; 0 uses all."""


@dataclass(frozen=True)
class DockConfig:
    capacity_bytes: int = 1073741824
    timeout_s: float = 120.0
    """Seconds a put or a get may wait before it fails and says what it waited for."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """Newest checkpoints that stay on disk; an older one goes when a newer one is complete."""
    export: bool = True
    """At the end, write the merged model in HF format and the adapter in PEFT format."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations (answers to held-out prompts); 0 evaluates never."""
    path: str = ""
    """Like data.train_path; empty takes lines that training does not use."""
    split: str = "test"
    """Split of eval.path where it names a data set of the hub."""
    prompts: int = 64
    samples: int = 1
    """Answers to each prompt: 1 takes the greedy one (pass@1), more are drawn (avg@n, maj@n, pass@k)."""
    temperature: float = 1.0
    """Of the answers drawn where eval.samples is more than 1."""
    correct_at: float = 1.0
    """An answer is correct when the reward's first function that judges answers gives it this much or more."""


@dataclass(frozen=True)
class TrackConfig:
    tensorboard: bool = True
    plot: bool = True
    samples: bool = True
    """Write samples.jsonl: prompts, responses, rewards."""
    samples_per_step: int = 8
    console: str = "auto"
    """auto (live display on a terminal, lines otherwise), lines or quiet."""


@dataclass(frozen=True)
class FaultConfig:
    """Deadlines, in seconds: what passes one ends the run with an error that says what it waited for."""

    start_timeout_s: float = 300.0
    rollout_timeout_s: float = 1800.0
    train_timeout_s: float = 1800.0


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    swap: SwapConfig = field(default_factory=SwapConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    router_replay: RouterReplayConfig = field(default_factory=RouterReplayConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    dock: DockConfig = field(default_factory=DockConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)

    @property
    def has_rollout_engine(self) -> bool:
        """Whether the workers load the rollout engine; dpo needs it for evaluations only."""
        return self.algorithm.name != "dpo" or self.eval.every > 0

    @property
    def has_reference(self) -> bool:
        """Whether the trainer takes log-probs of the first policy. With adapters it costs no memory and tells how far
        the policy went; a model that trains whole keeps its first weights only where something learns from them."""
        return self.lora.rank > 0 or self.algorithm.kl_coefficient > 0 or self.algorithm.name == "dpo"

    @property
    def train_data_parallel(self) -> int:
        """Data-parallel ranks of the trainer."""
        return self.cluster.workers // (self.train.tensor_parallel * self.train.pipeline_parallel)

    @property
    def samples_per_step(self) -> int:
        return self.algorithm.prompts_per_step * self.algorithm.samples_per_prompt

    @property
    def samples_per_mini_batch(self) -> int:
        return self.algorithm.prompts_per_mini_batch * self.algorithm.samples_per_prompt

    @property
    def mini_batches_per_step(self) -> int:
        """Optimizer updates in one step."""
        return self.algorithm.epochs_per_step * self.algorithm.prompts_per_step // self.algorithm.prompts_per_mini_batch

    @property
    def loss_constant_tokens(self) -> int:
        """Tokens that algorithm.loss_aggregation=sequence_sum_constant divides a sequence's sum by."""
        return self.algorithm.loss_constant_tokens or self.rollout.max_response_tokens

    @property
    def samples_per_rank_and_mini_batch(self) -> int:
        """Samples one data-parallel rank of the trainer packs into the micro-batches of an update."""
        return self.samples_per_mini_batch // self.train_data_parallel
