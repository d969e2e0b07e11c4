"""The sections of a config: one frozen pydantic model per section, one docstring per field.

A field's docstring says what the value means and, where the field may be left out, which value it then gets. A default
that another field of the same section decides is a function here. A default that needs another section is filled in by
load.py. Types are strict: "12" is no integer and 1 is no boolean, so a slip of the keyboard cannot change a run in
silence.

Properties are what follows from the fields: widths, shapes, ZeRO's stage. Whether two fields go together is for
checks.py to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

CODES_PER_GROUP = 4
"""Neighbouring columns of a row that share a Philox4x32 draw, which gives 4 words. They also share whole bytes in every
packed format: `Grid.group_codes` divides this number."""

STATE_BLOCK = 32
"""Neighbouring columns of a row that share the scale of their 8-bit moments."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes per element of the types that fields name; dtypes.py has the torch types."""

LATENT_SIGMAS = {3: 2.5, 4: 3.0, 5: 4.0, 6: 5.0, 7: 5.5, 8: 6.0}
"""Default of quantization.latent_sigmas by latent_bits. 4, 6 and 8 bits are the ranges of the prototypes that were
measured first (docs/LOG.md, 2026-11-25). The others lie between and beside them."""

Bits = Literal["ternary", 2, 3, 4, 5, 6, 7, 8]
Rounding = Literal["stochastic", "nearest"]
ScaleRule = Literal["absmean", "sigma", "absmax", "paper"]
FloatType = Literal["fp32", "bf16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The LLaMA to train: RMSNorm, RoPE, SwiGLU, no biases."""

    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Number of transformer blocks, each an attention and a feed-forward half. Building one takes milliseconds."""
    hidden_size: PositiveInt
    """Width of the residual stream: how many numbers stand for a token between two blocks."""
    ffn_hidden_size: PositiveInt
    """Width of the feed-forward half: outputs of gate_proj and up_proj, inputs of down_proj."""
    num_attention_heads: PositiveInt
    """Number of query heads of a block; the width of a head is hidden_size / num_attention_heads."""
    num_query_groups: PositiveInt = Field(default_factory=lambda data: data["num_attention_heads"])
    """Number of key/value heads, each of which serves as many query heads (grouped-query attention). Default:
    num_attention_heads, which is multi-head attention."""
    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)]
    """Rows of the embedding and of the head (the last layer, which scores tokens); at least the tokenizer's
    vocabulary. Published vocabularies have up to some 300,000 tokens."""
    seq_length: PositiveInt
    """Tokens of one training sample, and the longest text that the model reads at once."""
    sub_norm: bool = False
    """Extra RMSNorm before o_proj and before down_proj, as in the architecture of the DQT authors' code."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm, so that nothing is divided by zero."""
    rope_base: PositiveFloat = 10000.0
    """Base of the frequencies of the rotary position embedding; larger ones suit longer samples."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_hidden_size(self) -> int:
        """Width of all keys, and of all values, of one token."""
        return self.head_dim * self.num_query_groups

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears of one block, by their names in Hugging Face's LLaMA, in model order."""
        hidden, ffn, key_value = self.hidden_size, self.ffn_hidden_size, self.kv_hidden_size
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.v_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }

    @property
    def linear_weights_per_block(self) -> int:
        """Weights in the linears of one block."""
        return sum(rows * columns for rows, columns in self.linear_shapes().values())


class QuantizationConfig(Section):
    """How the linear layers of the blocks are stored and computed."""

    method: Literal["dqt", "bitnet", "none"] = "dqt"
    """What the weights of the linears are. dqt: integer codes only, updated by stochastic rounding. bitnet: BitNet
    b1.58, floating-point weights that are made ternary in each pass. none: ordinary floating-point weights."""
    bits: Bits = "ternary"
    """Grid of the codes, the integers that a weight may be: "ternary" (-1, 0, 1) or 2 to 8 bits, -2^(b-1) to 2^(b-1)-1.
    A weight is scale * code, with one scale per matrix."""
    latent_bits: Literal[3, 4, 5, 6, 7, 8] | None = None
    """Bits of a second, finer integer per weight, the latent, which AdamW and rounding update in place of the code. The
    code is a function of the latent. Latents are optimizer state: they are sharded with the moments and never
    gathered. For codes of up to 4 bits. Default: none, the codes are all there is."""
    latent_sigmas: PositiveFloat | None = Field(default_factory=lambda data: LATENT_SIGMAS.get(data["latent_bits"]))
    """Range of the latents in standard deviations of the initial weights: the weight of one latent is latent_sigmas *
    std / Qp, where Qp is the largest latent. Default: by latent_bits, 2.5 (3 bits) to 6 (8 bits)."""
    latent_threshold: PositiveInt | None = None
    """Smallest |latent| whose ternary code is not 0. Default: none, each latent has the code whose weight is nearest,
    so the threshold follows the scale."""
    scale_refit_interval: NonNegativeInt = Field(default_factory=lambda data: 0 if data["latent_bits"] is None else 1)
    """Steps between refits of the codes' scale from the mean magnitude of the latents, the rule that BitNet b1.58
    applies to its master weights. 0: the scale is fixed at initialisation. Default: 1 with latents, 0 without."""
    embeddings: bool = False
    """Store embedding and head as codes too, as the DQT authors' code does. By default both stay in high precision."""
    compute: Literal["fp32", "bf16", "fp8", "int8"] = "bf16"
    """Precision of the linears' matrix products. fp8: inputs, codes and output gradients in e4m3. int8: forward in
    int8, backward in bf16. With both, everything around the linears is in bf16. fp8 and int8 are for method dqt."""
    activation: Literal["int8", "e4m3", "none"] = Field(
        default_factory=lambda data: (
            "none" if data["method"] == "none" else "e4m3" if data["compute"] == "fp8" else "int8"
        )
    )
    """Quantisation of a linear's input, one scale per token. Default: none for method none, else e4m3 when compute is
    fp8 and int8 otherwise."""
    weight_gradient: Literal["bf16", "fp8"] = "fp8"
    """Operands of the product that gives the weights' gradients, when compute is fp8."""
    rounding: Rounding = "stochastic"
    """How an updated weight lands on the grid. stochastic: up or down at random, so that its mean is the wanted weight.
    nearest: the nearer code, so that small updates are lost; a control that makes no progress."""
    scale_rule: ScaleRule = Field(default_factory=lambda data: "absmean" if data["bits"] == "ternary" else "sigma")
    """Scale s of a matrix at initialisation, from initial weights W and the largest code Qp: absmean s = mean|W|; sigma
    s = scale_sigmas * std / Qp; absmax s = max|W| / Qp; paper s = mean|W| / Qp (for parity with arXiv 2412.04787 only:
    this rule clips). Default: absmean for ternary, sigma for n bits."""
    scale_sigmas: PositiveFloat = Field(
        default_factory=lambda data: 3.0 if data["bits"] == "ternary" or data["bits"] <= 4 else 6.0
    )
    """Range of the codes in standard deviations of the initial weights, for scale_rule sigma. Default: 3 up to 4 bits,
    6 above."""
    scale_power_of_two: bool = Field(default_factory=lambda data: data["scale_refit_interval"] == 0)
    """Round the scales at initialisation, of codes and of latents, to powers of two, so that scale * code is exact in
    bf16 and every export is lossless. Default: true; false when scales are refitted."""

    @property
    def dtype(self) -> FloatType:
        """Type of whatever is no operand of a low-bit product: residual stream, norms, attention, embeddings, head."""
        return "fp32" if self.compute == "fp32" else "bf16"


class OptimizerConfig(Section):
    """Update rule and learning-rate schedule."""

    name: Literal["adamw", "adafactor"] = "adamw"
    """Update rule of the low-bit weights. adamw: two moments per weight. adafactor: factored second moment, which saves
    memory. Everything else keeps AdamW, since DeepSpeed's flat partitions cannot be factored."""
    learning_rate: PositiveFloat
    """Learning rate of embeddings, head and norms after warm-up, where the schedule has its peak."""
    low_bit_learning_rate: PositiveFloat = Field(default_factory=lambda data: data["learning_rate"])
    """Learning rate of the linears of the blocks at the schedule's peak, in weight units, not codes: of the low-bit
    weights, or of their counterparts in the methods none and bitnet. Default: learning_rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of the high-precision matrices: a step takes rate * weight_decay of each weight away."""
    low_bit_weight_decay: NonNegativeFloat = 0.0
    """The same of the low-bit weights."""
    weight_decay_steps: NonNegativeInt | None = None
    """Both weight decays hold up to this step and are 0 after it. Default: they hold in every step."""
    beta1: Beta = 0.9
    """Decay of AdamW's first moment, the running mean of the gradient."""
    low_bit_beta1: Beta | None = Field(default_factory=lambda data: data["beta1"] if data["name"] == "adamw" else None)
    """beta1 of the linears of the blocks. Default: beta1 for adamw; none for adafactor, which then keeps no first
    moment of the low-bit weights."""
    beta2: Beta = 0.95
    """Decay of AdamW's second moment, the running mean of the squared gradient."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of AdamW's second moment, by which the update is divided."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "two_stage"] = "cosine"
    """Course of the learning rates after warm-up. wsd (warm-up, stable, decay) is constant but for the last
    decay_steps. two_stage is linear, and falls to second_stage_ratio of the line at half its length."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rates rise from 0 to their peaks, in a line."""
    decay_steps: PositiveInt | None = None
    """Length of the final decay, in steps; for wsd only. Default there: 10 % of training.steps."""
    second_stage_ratio: Fraction | None = Field(
        default_factory=lambda data: 2 / 3 if data["schedule"] == "two_stage" else None
    )
    """For two_stage only: peak of the second half's line as a fraction of the first's. Default there: 2/3, as BitNet
    b1.58 at 700 M weights and above, whose peaks are 1.5e-3 and 1e-3, or 1.2e-3 and 8e-4 (Microsoft, The Era of 1-bit
    LLMs: Training Tips, Code and FAQ, 2024)."""
    min_learning_rate_ratio: Fraction = 0.0
    """Rate at the last step as a fraction of the peak."""
    low_bit_min_learning_rate_ratio: Fraction = Field(default_factory=lambda data: data["min_learning_rate_ratio"])
    """The rate at the end of the linears of the blocks, as a fraction of their peak. Default:
    min_learning_rate_ratio."""
    low_bit_schedule_steps: PositiveInt | None = None
    """Step at which the schedule of the linears of the blocks ends; their rate stays at its floor after it, so with
    floor 0 the low-bit weights stay as they are. Default: training.steps."""
    gradient_dtype: FloatType = "fp32"
    """Type of the gradient buffers. Micro-batches are added up in this type, and gradients travel in this type. Ranks
    are added up in fp32. bf16 halves memory and traffic of gradients."""
    gradient_reduction: Literal["step", "micro_batch"] = "step"
    """When gradients are summed over data-parallel ranks. step: once per step, after the micro-batches are added up.
    micro_batch: with each micro-batch, which multiplies the traffic by the number of micro-batches. In ZeRO stages 2
    and 3 a rank then never keeps more than its owned rows."""
    second_moment: Literal["full", "factored"] = Field(
        default_factory=lambda data: "full" if data["name"] == "adamw" else "factored"
    )
    """What is kept of the second moment of low-bit weights. full: a value per weight. factored: means of rows and
    columns of a matrix, which take next to no memory. Default: full for adamw; adafactor is always factored."""
    state_bits: Literal[8, 32] = 32
    """Bits of each of AdamW's two moments of a low-bit weight. 8: fp8 values with one scale per 32 columns, rounded
    stochastically."""
    fused_backward: bool = False
    """Update each low-bit matrix as soon as the backward pass has made its gradient, so that gradients of the whole
    model never exist at once. Needs one micro-batch per step and max_grad_norm = 0. Elements of a gradient that are not
    finite then count as zero: the norm that would have stopped the step comes too late for the low-bit weights."""
    adafactor_decay_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    """Adafactor's second-moment decay is 1 - step^-adafactor_decay_rate."""
    adafactor_clip_threshold: PositiveFloat = 1.0
    """Root mean square above which Adafactor scales its own update down."""


class ParallelConfig(Section):
    """How one copy of the model is cut. The data parallel size is world size / (tensor * pipeline)."""

    tensor: PositiveInt = 1
    """Tensor parallel size: number of ranks that share each matrix. They should be GPUs of one node."""
    pipeline: PositiveInt = 1
    """Pipeline parallel size: number of ranks over which the blocks are spread, in order."""
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline rank, for the interleaved schedule. Default: none, which is the plain 1F1B schedule."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are split over the tensor-parallel ranks by sequence position."""
    peer_copies: bool | Literal["auto"] = "auto"
    """Whether activations travel between tensor-parallel ranks as copies by the GPUs' copy engines, and not as NCCL
    kernels, which take multiprocessors from the products beside them. Only with sequence parallelism. "auto": with
    quantization.compute "fp8" and without document masking, where the ranks are on one host and their GPUs have access
    to one another's memory. Results have the same bits either way."""
    context: PositiveInt = 1
    """Context parallel size. Only 1: megatron-core's attention over a split sequence exists inside Transformer Engine
    only."""

    @property
    def num_model_chunks(self) -> int:
        """Parts that the layers are cut into, over all pipeline ranks. A pipeline rank has one part, or
        virtual_pipeline."""
        return self.pipeline * (self.virtual_pipeline or 1)


class DataSource(Section):
    """One tokenised corpus of a blend."""

    path: Annotated[str, Field(min_length=1)]
    """Prefix of a .bin/.idx pair as tools/prepare_data.py writes it; relative to the working folder."""
    weight: PositiveFloat = 1.0
    """Share of the samples drawn from it, relative to the other sources' weights."""


Blend = Annotated[tuple[DataSource, ...], Field(min_length=1)]


TextName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class DataConfig(Section):
    """What the run reads: tokenised text, and the tokenizer."""

    train: Blend
    """Corpora to train on; samples are drawn from all of them, by their weights."""
    valid: Blend | None = None
    """Corpora to measure the validation loss on. Default: none, and valid_fraction of the training corpus is kept out
    for it."""
    valid_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Part of the training corpus held out when valid is not given."""
    valid_texts: dict[TextName, Blend] = Field(default_factory=dict)
    """Further texts, by name, whose losses each validation measures one by one: `{"code": [{"path": "data/code"}]}`
    gives the metric valid_loss.code. Each takes the time of a validation."""
    tokenizer: Annotated[str, Field(min_length=1)]
    """SentencePiece .model file, or tokenizer.json of Hugging Face, with which the corpora were tokenised."""
    document_masking: bool = False
    """Attention does not cross documents: a token sees what stands before it in its own document, and positions restart
    with each document, in training and in validation. The mark at the end of a document begins the next one. Default:
    a token sees all that stands before it in its sample, whatever document that is of."""
    num_workers: NonNegativeInt = 2
    """Processes of each rank that read samples; 0: the rank reads them itself."""

    @property
    def blends(self) -> dict[str, Blend]:
        """All that the run reads, by field."""
        texts = {f"data.valid_texts.{name}": blend for name, blend in self.valid_texts.items()}
        return {"data.train": self.train} | ({} if self.valid is None else {"data.valid": self.valid}) | texts


class TrainingConfig(Section):
    """Length, batch and seed of the run, and how a step is carried out."""

    steps: PositiveInt
    """Length of the run in optimizer steps; each changes the weights once."""
    micro_batch_size: PositiveInt
    """Samples of one forward and backward pass on one data-parallel rank."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step over all ranks: a multiple of data parallel size * micro_batch_size."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Key of every random draw: of initial weights, of rounding, of the order of samples. 32 bits, because the seed is
    one word of the Philox key."""
    deterministic: bool = False
    """Only deterministic kernels, so that a run on GPUs too gives the same bits each time and in every ZeRO stage. This
    costs speed: the fused attention kernels are faster when their backward may add up in any order. CPU runs are always
    deterministic."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """Activation checkpointing: what the backward pass computes again instead of reading it from memory. mlp: the
    feed-forward half of each block. full: whole blocks, of which only the input is kept."""
    recompute_layers: PositiveInt | None = None
    """Number of blocks per model chunk for which `recompute` holds. A pipeline stage is one chunk, or virtual_pipeline
    of them. Default: all blocks."""
    cuda_graph: bool | Literal["auto"] = False
    """Launch forward and backward of a micro-batch (with a pipeline: of a whole step) as one CUDA graph, so that
    Python's speed does not matter. Not with ZeRO stage 3 or optimizer.fused_backward. Gradients then stay allocated
    between steps. auto: on a GPU, when no other field of the config stands against a graph."""
    max_skipped_steps: PositiveInt = 10
    """Skipped steps in a row after which the run stops: with a loss or gradients that are not finite, or with a spike.
    Such a step changes no weight."""
    spike_deviations: PositiveFloat | None = None
    """A step is skipped when its loss lies more than this number of standard deviations above the mean of the last
    spike_window losses. Default: none, a finite loss is never a spike."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Losses that a spike is measured against, of the last steps that were not skipped. No step is skipped until there
    are that many."""
    replay_suspicious_steps: bool = False
    """Execute a skipped step again, and compare all gradients bit for bit: equal means that the data or the weights are
    the reason; a difference ends the run and names the rank. The last batch is also executed twice after a failed
    replica check. Needs deterministic = true. Costs a pass over the gradients and a wait for the device in each
    step."""
    startup_timeout_seconds: PositiveFloat = 1800.0
    """Longest time without progress until the first step is done, and in a save, after which the run ends and names
    the ranks that it waited for."""
    step_timeout_seconds: PositiveFloat = 600.0
    """Longest time without progress in everything after the first step: reading a batch, a step, a batch of a
    validation."""
    replica_check_interval: NonNegativeInt = 100
    """Steps between comparisons of the weights that several ranks hold alike. A difference stops the run. 0 for
    none."""
    eval_interval: NonNegativeInt = 0
    """Steps between validations; 0 for one at the end only."""
    eval_batches: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    """Global batches of one validation: always the same samples of a text, in most runs a small part of it.
    tools/evaluate.py scores a whole text."""
    sample_prompt: str | None = None
    """When given, the report at the end shows a continuation of this text. For it, rank 0 loads the whole last
    checkpoint after training (4 bytes per weight, on the GPU where there is one). Leave the prompt out where one
    process cannot hold the model. Default: no sample."""
    sample_tokens: PositiveInt = 64
    """Maximum number of tokens of the continuation. It also ends with the document or with the model's context."""


class CheckpointConfig(Section):
    """The run folder and what is kept in it."""

    dir: Annotated[str, Field(min_length=1)]
    """Run folder, relative to the working folder: gets config.json, metrics.jsonl, tb/, checkpoints/, summary.json. A
    run goes on from the checkpoints that it finds there."""
    interval: NonNegativeInt = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Steps between checkpoints that stay on disk for good, beside the newest. Default: none stay."""
    async_save: bool = False
    """Copy the state to host memory and write the copy while training goes on. false: training waits for the disk."""


MOST_PROFILED_STEPS = 100
"""A trace holds every operation of every step, in memory until the last one."""


class LoggingConfig(Section):
    """What is recorded, and how often."""

    interval: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    histogram_interval: PositiveInt = 100
    """Steps between TensorBoard's per-layer histograms."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    wandb_project: Annotated[str, Field(min_length=1)] | None = None
    """Project of Weights & Biases that gets the curves too; needs the package wandb. WANDB_MODE=offline keeps them in
    wandb/ of the run folder. Default: none."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s, for the MFU. Default: from a table of devices, or measured."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step that torch.profiler records, at most 100 steps. Each rank leaves a trace in traces/ of the
    run folder. Default: none."""


@dataclass(frozen=True)
class ZeroOptimization:
    """deepspeed.zero_optimization, read in this one place.

    The section belongs to DeepSpeed, so values stand here as the user wrote them. checks.py refuses the ones that are
    not valid, so in a loaded config `stage` is 0 to 3 and `optimizer_device` is "none" or "cpu".
    """

    section: Any
    """The whole object."""
    stage: int
    """0 when not named."""
    optimizer_device: str | None
    """Where masters and moments live: offload_optimizer.device, "none" (beside the weights) when not named. None when
    offload_optimizer is no object."""

    @classmethod
    def of(cls, deepspeed: dict[str, Any]) -> ZeroOptimization:
        section = deepspeed.get("zero_optimization", {})
        if not isinstance(section, dict):
            return cls(section, 0, "none")
        offload = section.get("offload_optimizer", {})
        device = offload.get("device", "none") if isinstance(offload, dict) else None
        return cls(section, section.get("stage", 0), device)

    @property
    def offloads_optimizer(self) -> bool:
        return self.optimizer_device != "none"


class Config(Section):
    """One run."""

    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig = LoggingConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed to deepspeed.initialize. This project reads zero_optimization.stage (0 to 3; default 0) and
    zero_optimization.offload_optimizer.device ("cpu" or "none"; default "none"), which hold for low-bit weights too.
    Keys that follow from other sections are refused."""

    @property
    def zero(self) -> ZeroOptimization:
        """The deepspeed section as far as this project reads it."""
        return ZeroOptimization.of(self.deepspeed)

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the run; 0 when the deepspeed section names none."""
        return self.zero.stage

    @property
    def offloads_optimizer(self) -> bool:
        """Whether masters and moments live in the host's memory."""
        return self.zero.offloads_optimizer

    @property
    def data_index_folder(self) -> str:
        """Where the run keeps what it has found out about its data: the order of samples, smallest and largest ids."""
        return f"{self.checkpoint.dir}/data_index"

    def shows_metrics(self, step: int) -> bool:
        """Whether the run writes a line of metrics after `step`."""
        return step % self.logging.interval == 0 or step in (1, self.training.steps)

    def shows_codes(self, step: int) -> bool:
        """Whether the run writes figures of each matrix to TensorBoard after `step`."""
        return self.logging.tensorboard and step % self.logging.histogram_interval == 0

    @property
    def has_variable_length_attention(self) -> bool:
        """Whether torch's flash attention for sequences of varying length takes the heads of this model, on a GPU.

        Heads are of 16 bits, and their width is a multiple of 8 and at most 256 (check_flash_attention_head_dim of
        aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
        """
        head = self.model.head_dim
        return self.quantization.dtype == "bf16" and head % 8 == 0 and head <= 256

    @property
    def layers_per_chunk(self) -> int:
        """Blocks of a model chunk."""
        return self.model.num_layers // self.parallel.num_model_chunks

    @property
    def recompute_layers(self) -> int:
        """Number of blocks per model chunk for which training.recompute holds."""
        return self.training.recompute_layers or self.layers_per_chunk
