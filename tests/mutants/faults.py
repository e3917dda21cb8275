"""Faults to plant: each one line that a tired engineer could have written, and who must notice."""

from __future__ import annotations

from dataclasses import dataclass

LAYER = "megatron_coe/model/moe/layer.py"
ROUTER = "megatron_coe/model/moe/router.py"
EXPERTS = "megatron_coe/model/moe/experts.py"
EXPERT_MLP = "megatron_coe/model/moe/grouped_mlp.py"
GROUPED_GEMM = "megatron_coe/model/kernels/grouped_gemm.py"
EXPERT_ACTIVATION = "megatron_coe/model/moe/expert_activation.py"
SPECS = "megatron_coe/model/layer_specs.py"
CONFIG = "megatron_coe/model/config.py"
LINEAR_CROSS_ENTROPY = "megatron_coe/model/linear_cross_entropy.py"
UPCYCLE = "megatron_coe/conversion/upcycle.py"
HF_MODEL = "megatron_coe/hf/modeling_coe.py"
DATASETS = "megatron_coe/data/datasets.py"
INDEXED = "megatron_coe/data/indexed.py"
INDEX_CACHE = "megatron_coe/data/index_cache.py"
OBJECTIVE = "megatron_coe/training/loss.py"
SETUP = "megatron_coe/distributed/train_state.py"
PATCHES = "megatron_coe/megatron_compat/patches.py"
LOOP = "megatron_coe/training/trainer.py"
SIGNALS = "megatron_coe/fault_tolerance/signals.py"
TORCH = "megatron_coe/model/backends/torch.py"
MODEL = "megatron_coe/config/model_section.py"
WEIGHT_INIT = "megatron_coe/model/weight_init.py"
ROUTING = "megatron_coe/analysis/routing.py"
MUTUAL_INFORMATION = "megatron_coe/analysis/mutual_information.py"
COLLECT = "megatron_coe/analysis/collect.py"

OF_EXPERIMENTS = ("tests/unit/experiments/test_claims.py",)
OF_LAYER = ("tests/unit/model/moe/test_layer.py",)
OF_MTP = ("tests/unit/conversion/test_mtp.py",)
OF_MUON = ("tests/unit/distributed/test_muon.py",)
OF_METRICS = ("tests/distributed/test_metrics.py",)
OF_ROUTING_STATS = ("tests/unit/model/moe/test_routing_stats.py",)
OF_ROUTER = ("tests/unit/model/moe/test_router.py",)
OF_MODEL = (
    "tests/unit/model/test_layer_specs.py",
    "tests/unit/model/test_provider.py",
    "tests/unit/model/test_config.py",
)
OF_LINEAR_CROSS_ENTROPY = ("tests/unit/model/test_linear_cross_entropy.py",)
OF_EXPERTS = ("tests/unit/model/moe/test_experts.py",)
OF_GROUPED_GEMM = ("tests/unit/model/kernels/test_grouped_gemm.py",)
OF_EXPERT_MLP = ("tests/unit/model/moe/test_grouped_mlp.py",)
OF_OBJECTIVE = ("tests/unit/training/test_loss.py",)
OF_SETUP = ("tests/unit/distributed/test_train_state.py",)
OF_PATCHES = ("tests/unit/megatron_compat/test_patches.py",)
OF_SIGNALS = ("tests/unit/fault_tolerance/test_signals.py",)
OF_INITIAL_WEIGHTS = (
    "tests/unit/model/test_weight_init.py",
    "tests/distributed/test_initial_weights.py",
)
OF_LAYOUTS = ("tests/distributed/test_layouts.py",)
OF_UPCYCLE = ("tests/unit/conversion/test_upcycle.py",)
OF_HF = ("tests/unit/hf/test_modeling_coe.py",)
OF_PLANS = ("tests/unit/planning/test_memory.py",)
OF_DATA = ("tests/unit/data/test_datasets.py",)
OF_INDICES = ("tests/unit/data/test_indexed.py", "tests/unit/data/test_index_cache.py")
OF_SAVING = ("tests/unit/checkpoint/test_checkpointer.py",)
OF_RESUMING = ("tests/unit/checkpoint/test_resume.py",)
OF_BENCHMARK = tuple(f"tests/unit/benchmarks/test_{n}.py" for n in ("timing", "layers", "phases"))
OF_FOLDERS = ("tests/unit/checkpoint/test_directory.py",)
OF_CARRIED = ("tests/unit/checkpoint/test_tokenizer.py",)
OF_VERSIONS = ("tests/unit/checkpoint/test_versions.py",)
OF_PRETRAINING = ("tests/functional/test_pretrain.py",)


@dataclass(frozen=True)
class Fault:
    """Replace `old`, which stands once in `file`, by `new`; some of `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs: str = ""
    """The package without which the tests are skipped, and the fault is too."""


FAULTS = [
    Fault(
        "stock layer timed with an iteration too few",
        "benchmarks/layers.py",
        "for _ in range(self.iterations):",
        "for _ in range(self.iterations - 1):",
        OF_BENCHMARK,
    ),
    Fault(
        "one variant always runs first",
        "benchmarks/timing.py",
        "first = index % len(variants)",
        "first = 0",
        OF_BENCHMARK,
    ),
    Fault(
        "backward pass counted as forward",
        "benchmarks/phases.py",
        "seconds[phase][backward] += own_us / 1e6",
        "seconds[phase][False] += own_us / 1e6",
        OF_BENCHMARK,
    ),
    Fault(
        "experts' FLOPs without the gate",
        "benchmarks/layers.py",
        "return 6 * rows * ffn_params(config, config.moe_ffn_hidden_size)",
        "return 6 * rows * 2 * config.hidden_size * config.moe_ffn_hidden_size",
        OF_BENCHMARK,
    ),
    Fault(
        "second iteration's auxiliary loss dropped",
        ROUTER,
        "        masked = padding_mask is not None\n",
        "        masked = padding_mask is not None\n        if self.iteration == 1:\n"
        "            return probs\n",
        OF_LAYER,
    ),
    Fault(
        "auxiliary loss averaged over iterations",
        ROUTER,
        "MoEAuxLossAutoScaler.apply(activation, aux_loss * weight)",
        "MoEAuxLossAutoScaler.apply(\n"
        "            activation, aux_loss * weight / self.config.coe_iterations\n        )",
        OF_LAYER,
    ),
    Fault(
        "groups ranked by the mean of their experts",
        ROUTER,
        "scores_TGn.amax(dim=-1)",
        "scores_TGn.mean(dim=-1)",
        OF_ROUTER,
    ),
    Fault(
        "auxiliary loss counts S tokens, not S x B",
        ROUTER,
        "self.num_tokens = S * B if",
        "self.num_tokens = S if",
        OF_ROUTER,
    ),
    Fault(
        "logged under the same iteration",
        ROUTER,
        "self.iteration, self.as_indices = iteration, as_indices",
        "self.iteration, self.as_indices = 0, as_indices",
        OF_ROUTER,
    ),
    Fault(
        "one router used twice",
        ROUTER,
        "return self[iteration](input, padding_mask, iteration, as_indices)",
        "return self[max(iteration - 1, 0)](input, padding_mask, iteration, as_indices)",
        OF_LAYER,
    ),
    Fault(
        "scores renormalized over the chosen",
        ROUTER,
        'elif self.score_function == "sigmoid" and self.topk > 1:',
        "elif self.topk > 1:",
        OF_LAYER,
    ),
    Fault(
        "scaling factor forgotten",
        ROUTER,
        "if self.config.moe_router_topk_scaling_factor:",
        "if False:",
        OF_LAYER,
    ),
    Fault(
        "softmax in fp32 also for fp64",
        ROUTER,
        "dtype = torch.promote_types(logits_TN.dtype, torch.float32)",
        "dtype = torch.float32",
        OF_ROUTER,
    ),
    Fault(
        "expert bias counts the last iteration only",
        ROUTER,
        "self.local_tokens_per_expert += routing_map.sum(dim=0)",
        "self.local_tokens_per_expert.copy_(routing_map.sum(dim=0))",
        OF_ROUTER,
    ),
    Fault(
        "routers start like other linears",
        ROUTER,
        "torch.nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))",
        "pass",
        OF_LAYER,
    ),
    Fault(
        "all blocks of rows start alike",
        WEIGHT_INIT,
        "counter=block << 64",
        "counter=0",
        OF_INITIAL_WEIGHTS,
    ),
    Fault(
        "each rank starts from the first columns",
        WEIGHT_INIT,
        "first_column : first_column + columns",
        ":columns",
        OF_INITIAL_WEIGHTS,
    ),
    Fault(
        "a rank starts from the first rows of a block",
        WEIGHT_INIT,
        "begin - start :, first",
        ": end - begin, first",
        OF_INITIAL_WEIGHTS,
    ),
    Fault(
        "residual of the wrong mode",
        LAYER,
        "x = self._iterate(t, x, x_0, padding_mask)",
        "x = self._iterate(t, x, x, padding_mask)",
        OF_LAYER,
    ),
    Fault(
        "residual of `none` for `inner_outer`",
        LAYER,
        'if residual in ("inner", "inner_outer"):',
        'if residual == "inner":',
        OF_LAYER,
    ),
    Fault(
        "upcycled: the first iteration is gated too",
        LAYER,
        "if upcycled and t > 0:",
        "if upcycled:",
        OF_LAYER,
    ),
    Fault(
        "upcycled: gates start open",
        LAYER,
        "torch.zeros(config.hidden_size",
        "torch.ones(config.hidden_size",
        OF_LAYER,
    ),
    Fault(
        "upcycled: gates miss the other ranks' part of the sequence",
        LAYER,
        "scale.sequence_parallel = config.sequence_parallel",
        "scale.sequence_parallel = False",
        OF_LAYOUTS,
    ),
    Fault(
        "upcycled: routers' biases stay behind",
        UPCYCLE,
        r'r"\.router\.\d+\.", ".router."',
        r'r"\.router\.\d+\.weight", ".router.weight"',
        OF_UPCYCLE,
    ),
    Fault(
        "router reads x(0) in every iteration",
        LAYER,
        "x = self._iterate(t, x, x, padding_mask)",
        "x = self._iterate(t, x_0, x, padding_mask)",
        OF_LAYER,
    ),
    Fault(
        "one iteration too few",
        LAYER,
        "for t in range(self.config.coe_iterations):",
        "for t in range(max(1, self.config.coe_iterations - 1)):",
        OF_LAYER,
    ),
    Fault(
        "stale dispatcher state: the first pass's routing map",
        LAYER,
        "hidden_states, probs = self.preprocess(x, probs, routing_map)",
        "self.first = routing_map if t == 0 else self.first\n"
        "        hidden_states, probs = self.preprocess(x, probs, self.first)",
        OF_LAYER,
    ),
    Fault(
        "shared expert in the first iteration only",
        LAYER,
        "None if is_async else self.shared_experts_compute(x)",
        "None if is_async or t > 0 else self.shared_experts_compute(x)",
        OF_LAYER,
    ),
    Fault(
        "stream added in the paper's mode",
        SPECS,
        "get_bias_dropout_add if config.adds_residual else get_bias_add_without_residual",
        "get_bias_dropout_add",
        OF_MODEL,
    ),
    Fault(
        "every layer edits the same spec",
        SPECS,
        "block.layer_specs = [deepcopy(spec) for spec in block.layer_specs]",
        "block.layer_specs = list(block.layer_specs)",
        OF_MODEL,
    ),
    Fault(
        "output layers start smaller, as Megatron's",
        CONFIG,
        "self.output_layer_init_method: Any = init_method_normal(self.init_method_std)",
        "pass",
        OF_MODEL,
    ),
    Fault(
        "probabilities applied twice",
        EXPERTS,
        "return (activated * probs_T1).to(hidden_TF.dtype)",
        "return (activated * probs_T1 * probs_T1).to(hidden_TF.dtype)",
        OF_EXPERTS,
    ),
    Fault(
        "Megatron is not told that its buffers have the weight gradients",
        EXPERT_MLP,
        "weight.grad_added_to_main_grad = True",
        "weight.grad_added_to_main_grad = False",
        OF_EXPERT_MLP,
    ),
    Fault(
        "a frozen projection leaves the other one without a gradient",
        EXPERT_MLP,
        "fc1, fc2, call, wants_dw1 or wants_dw2",
        "fc1, fc2, call, call.parameters[0].requires_grad and call.parameters[1].requires_grad",
        OF_EXPERT_MLP,
    ),
    Fault(
        "a micro-batch's weight gradient overwrites the one before",
        EXPERT_MLP,
        "self.beta = 1 if main_grads else 0",
        "self.beta = 0",
        OF_EXPERT_MLP,
    ),
    Fault(
        "a gathered row is the slot's, not the token's",
        GROUPED_GEMM,
        "a = x + (loaded // TOP_K)",
        "a = x + (loaded)",
        OF_GROUPED_GEMM,
        needs="triton",
    ),
    Fault(
        "a tile's last rows overwrite the next expert's",
        GROUPED_GEMM,
        "stored = (rows < end)[:, None] & (n < OUTPUTS)[None, :]",
        "stored = (rows < end + 1)[:, None] & (n < OUTPUTS)[None, :]",
        OF_GROUPED_GEMM,
        needs="triton",
    ),
    Fault(
        "Transformer Engine wherever it is installed",
        "megatron_coe/model/backends/select.py",
        "AUTO_PARTS: tuple[str, ...] = ()",
        "AUTO_PARTS: tuple[str, ...] = TE_PARTS",
        ("tests/unit/model/backends/test_select.py",),
    ),
    Fault(
        "activation's gradient without the router's weight",
        EXPERT_ACTIVATION,
        "        dy_TF = _weighted(dy_TF, probs_T1)\n        dhidden",
        "        dhidden",
        OF_EXPERT_MLP,
    ),
    Fault(
        "padding in the loss",
        OBJECTIVE,
        "valid_BS = loss_mask_BS > 0",
        "valid_BS = loss_mask_BS >= 0",
        OF_OBJECTIVE,
    ),
    Fault(
        "mean of the micro-batches' means",
        OBJECTIVE,
        "return kept_BS.sum() * scale.to(dtype),",
        "return kept_BS.sum() / valid_BS.sum(),",
        OF_OBJECTIVE,
    ),
    Fault(
        "the token after the cut is predicted",
        DATASETS,
        'sample["loss_mask"][targets] = 1.0',
        'sample["loss_mask"][inputs] = 1.0',
        OF_DATA,
    ),
    Fault(
        "norms without weight decay",
        SETUP,
        "({} if train.decay_all_parameters else standard) |",
        "standard |",
        OF_SETUP,
    ),
    Fault(
        "resumed Adam: the step count from before loading",
        PATCHES,
        "{**tensors, **restored}",
        "{**restored, **tensors}",
        OF_PATCHES,
    ),
    Fault(
        "resumed Adam: one step count for all parameters",
        PATCHES,
        'state.get("step", step).to(step, copy=True)',
        'state.get("step", step).to(step)',
        OF_PATCHES,
    ),
    Fault(
        "exported model: the auxiliary loss in the value",
        HF_MODEL,
        "loss = loss + (aux_loss - aux_loss.detach())",
        "loss = loss + aux_loss",
        OF_HF,
    ),
    Fault(
        "exported model: groups by their sum",
        HF_MODEL,
        "groups_TGn.amax(dim=-1)",
        "groups_TGn.sum(dim=-1)",
        OF_HF,
    ),
    Fault(
        "exported model: dense layers without the stream",
        HF_MODEL,
        "config.adds_stream if has_experts else True",
        "config.adds_stream",
        OF_HF,
    ),
    Fault(
        "a signal that a launcher kept back is lost",
        SIGNALS,
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)",
        "pass",
        OF_SIGNALS,
    ),
    Fault(
        "a run stopped before its first checkpoint is not saved",
        LOOP,
        "if self.progress.step > self._saved_step:",
        "if self.progress.step > self._saved_step > 0:",
        ("tests/distributed/test_signals.py",),
    ),
    Fault(
        "experts' weights read before they are gathered",
        "megatron_coe/model/moe/experts.py",
        "return SharedWeights(self.linear_fc1(), self.linear_fc2(), self.backend())",
        "return SharedWeights(self.linear_fc1.weight, self.linear_fc2.weight, self.backend())",
        ("tests/distributed/test_training.py",),
    ),
    Fault(
        "experts' gradients not summed over TP, as Megatron forgets to",
        LAYER,
        "parameter.allreduce = False",
        "parameter.allreduce = True",
        OF_LAYOUTS,
    ),
    Fault(
        "interleaved pipeline with batched messages, Megatron's default",
        MODEL,
        '"overlap_p2p_comm": True, "batch_p2p_comm": False',
        '"overlap_p2p_comm": False, "batch_p2p_comm": True',
        OF_LAYOUTS,
    ),
    Fault(
        "context-parallel chunks of keys out of order",
        TORCH,
        "torch.cat(chunks[::2] + chunks[::-2])",
        "torch.cat(chunks)",
        OF_LAYOUTS,
    ),
    Fault(
        "the second chunk of queries does not see what lies between the two",
        TORCH,
        "zip((rank, last - rank), query.chunk(2), strict=True)",
        "zip((rank, rank + 1), query.chunk(2), strict=True)",
        OF_LAYOUTS,
    ),
    Fault(
        "rotary keys keep each tensor-parallel rank's own gradient, as Megatron's",
        TORCH,
        "self.linear_kv_down_proj.register_forward_hook(self._own_tokens)",
        "pass",
        OF_LAYOUTS,
    ),
    Fault(
        "a pack's positions run on from document to document",
        "megatron_coe/model/documents.py",
        "max(end - start for start, end in _documents(offsets))",
        "offsets[-1]",
        ("tests/unit/model/test_documents.py",),
    ),
    Fault(
        "the token before an answer is a target, and its last one is not",
        DATASETS,
        "torch.from_numpy(answers[1:]).float()",
        "torch.from_numpy(answers[:-1]).float()",
        ("tests/unit/data/test_chat.py",),
    ),
    Fault(
        "recomputed layers above a frozen embedding learn nothing",
        "megatron_coe/model/freezing.py",
        "output.detach().requires_grad_() if torch.is_grad_enabled() else output",
        "output",
        ("tests/unit/model/test_freezing.py",),
    ),
    Fault(
        "later tokens weighed by the micro-batch's mask alone",
        "megatron_coe/training/step.py",
        'loss_mask=batch["loss_mask"] * scale,',
        'loss_mask=batch["loss_mask"],',
        ("tests/unit/training/test_mtp.py",),
    ),
    Fault(
        "an update is made whatever the device has found",
        "megatron_coe/training/optimizer_step.py",
        "adam.found_inf = is_finite.logical_not().float()",
        "adam.found_inf = is_finite.logical_not().float() * 0",
        ("tests/unit/training/test_optimizer_step.py",),
    ),
    Fault(
        "worker processes skip the micro-batches of other ranks twice",
        "megatron_coe/training/batch_source.py",
        "numbers = range(numbers.start + self.stride, numbers.stop + self.stride)",
        "numbers = range(numbers.start + 2 * self.stride, numbers.stop + 2 * self.stride)",
        ("tests/unit/training/test_batch_source.py",),
    ),
    Fault(
        "workers draw their seed from the run's generator",
        "megatron_coe/training/batch_source.py",
        "generator=torch.Generator(),",
        "generator=None,",
        ("tests/unit/training/test_batch_source.py",),
    ),
    Fault(
        "scores are rounded before experts are chosen",
        ROUTER,
        "return torch.sigmoid(logits_TN.to(dtype))\n",
        "return torch.sigmoid(logits_TN.to(dtype)).type_as(logits_TN)\n",
        OF_ROUTER,
    ),
    Fault(
        "top-k probabilities pass no gradient on in deterministic mode",
        "megatron_coe/model/moe/router.py",
        "dvalues_TN = torch.where(is_taken_TN, dtaken_TK[:, k, None], dvalues_TN)",
        "dvalues_TN = torch.where(is_taken_TN, dtaken_TK[:, 0, None], dvalues_TN)",
        ("tests/unit/distributed/test_seeds.py",),
    ),
    Fault(
        "the host asks for the gradients' norm by itself",
        "megatron_coe/training/optimizer_step.py",
        "self._launch(sums[2:].sum().sqrt(),",
        "self._launch(torch.tensor(sums[2:].sum().item()).sqrt(),",
        ("tests/unit/training/test_optimizer_step.py",),
    ),
    Fault(
        "gradients are sums over the positions of the batch, not means",
        "megatron_coe/training/optimizer_step.py",
        "self._config.grad_scale_func = lambda loss: loss / positions",
        "self._config.grad_scale_func = lambda loss: loss / 1",
        ("tests/distributed/test_optimizer_step.py",),
    ),
    Fault(
        "a run imports what it does not use",
        "megatron_coe/training/validation.py",
        "from __future__ import annotations\n",
        "from __future__ import annotations\n\nimport transformers\n",
        ("tests/functional/test_start_up.py",),
    ),
    Fault(
        "gradients are divided before the backward pass and after it",
        "megatron_coe/training/optimizer_step.py",
        "finalize_model_grads(model, None, **options)",
        "finalize_model_grads(model, num_tokens, **options)",
        ("tests/distributed/test_optimizer_step.py",),
    ),
    Fault(
        "a run on a CPU is resumed with the rounding of a GPU's update",
        "megatron_coe/training/optimizer_step.py",
        "grad_norm = float(self._optimizer.get_grad_norm())\n        loss_sum,",
        "grad_norm = self._sums(totals)[2:].sum().sqrt().item()\n        loss_sum,",
        ("tests/unit/fault_tolerance/test_nonfinite.py",),
    ),
    Fault(
        "the vocabulary's padding counts from each tensor-parallel rank's first row",
        "megatron_coe/model/vocab_padding.py",
        "max(vocab_size - first_id, 0)",
        "min(vocab_size, width)",
        ("tests/distributed/test_vocab_padding.py",),
    ),
    Fault(
        "of the losses' gradient the first token's stands for all",
        LINEAR_CROSS_ENTROPY,
        "torch._assert_async(",
        "(lambda kept, message: None)(",
        OF_LINEAR_CROSS_ENTROPY,
    ),
    Fault(
        "the weight gradient of the last chunk alone",
        LINEAR_CROSS_ENTROPY,
        "return dw_VH.addmm_(dlogits_TV.t(), x_TH)",
        "return dw_VH.addmm_(dlogits_TV.t(), x_TH, beta=0)",
        OF_LINEAR_CROSS_ENTROPY,
    ),
    Fault(
        "a stand-in joins the embedding's part of a tied weight's gradient",
        LINEAR_CROSS_ENTROPY,
        'shared = getattr(weight, "zero_out_wgrad", False)',
        "shared = False",
        OF_LINEAR_CROSS_ENTROPY,
    ),
    Fault(
        "each rank takes a label of another one for its own",
        LINEAR_CROSS_ENTROPY,
        "columns = labels - self.first",
        "columns = labels % max(self.columns, 1)",
        OF_LINEAR_CROSS_ENTROPY,
    ),
    Fault(
        "the loss of a later token under the mask of this one",
        "megatron_coe/model/gpt_model.py",
        "losses_BS = mask_BS * self._losses(x_SBH, labels_BS, mask_BS, detach) * scale",
        "losses_BS = self._losses(x_SBH, labels_BS, None, detach) * scale",
        ("tests/unit/model/test_gpt_model.py",),
    ),
    Fault(
        "a resumed optimizer counts its steps from 0",
        "megatron_coe/checkpoint/optimizer_state.py",
        "set_step(self.optimizer, step)",
        "set_step(self.optimizer, 0)",
        ("tests/unit/checkpoint/test_state.py",),
    ),
    Fault(
        "64 experts may be divided by anything",
        "megatron_coe/model/parallelism.py",
        'Rule("num_moe_experts", (_EP,), lambda layout: layout.expert_model_parallel_size)',
        'Rule("num_moe_experts", (_EP,), lambda layout: 1)',
        ("tests/unit/model/test_parallelism.py",),
    ),
    Fault(
        "latents that do not divide over tensor-parallel ranks",
        "megatron_coe/model/parallelism.py",
        'Rule("kv_latent_width", (_TP,), lambda layout: layout.tensor_model_parallel_size)',
        'Rule("kv_latent_width", (_TP,), lambda layout: 1)',
        ("tests/unit/model/test_parallelism.py",),
    ),
    Fault(
        "stages with more layers than the model",
        CONFIG,
        "if first + last > self.num_layers:",
        "if first + last > 2 * self.num_layers:",
        ("tests/unit/model/test_parallelism.py",),
    ),
    Fault(
        "GPU number 0 of Slurm's taken for none",
        "megatron_coe/utils/environment.py",
        'if count and (name, count) != ("SLURM_GPUS_ON_NODE", "0"):',
        'if count and count != "0":',
        ("tests/unit/utils/test_environment.py",),
    ),
    Fault(
        "activations of one iteration only",
        "megatron_coe/planning/activations.py",
        "for t in range(plan.model.coe_iterations)), Saved())",
        "for t in range(1)), Saved())",
        OF_PLANS,
    ),
    Fault(
        "one micro-batch in flight on every stage",
        "megatron_coe/planning/activations.py",
        "return [min(total, stages - stage)]",
        "return [min(total, 1)]",
        OF_PLANS,
    ),
    Fault(
        "routers divided by tensor-parallel ranks",
        "megatron_coe/model/flops.py",
        "C * N * config.hidden_size, replicated=routers)",
        "C * N * config.hidden_size)",
        ("tests/unit/planning/test_build.py",),
    ),
    Fault(
        "what is recomputed does not have to fit",
        "megatron_coe/planning/layout_search.py",
        "return candidate.memory.total <= usable_memory(cluster)",
        "return candidate.memory.weights <= usable_memory(cluster)",
        ("tests/unit/planning/test_layout_search.py",),
    ),
    Fault(
        "tokens exchanged once, whatever the iterations",
        "megatron_coe/planning/communication.py",
        "plan.num_microbatches * model.coe_iterations",
        "plan.num_microbatches",
        ("tests/distributed/test_memory.py",),
    ),
    Fault(
        "a save in the background writes the live weights",
        "megatron_coe/checkpoint/checkpointer.py",
        "self._together(progress.step, plan.take_copy)",
        "pass",
        OF_SAVING,
    ),
    Fault(
        "a manifest's hashes are not compared",
        "megatron_coe/checkpoint/manifest.py",
        "if digest_of(folder / name, expected.algorithm) != expected:",
        "if digest_of(folder / name, expected.algorithm).size != expected.size:",
        OF_RESUMING,
    ),
    Fault(
        "a manifest may belong to another step",
        "megatron_coe/checkpoint/verify.py",
        "if manifest.step != step:",
        "if False:",
        OF_RESUMING,
    ),
    Fault(
        "what a manifest does not list is read all the same",
        "megatron_coe/checkpoint/verify.py",
        "needed - manifest.files.keys()",
        "set()",
        OF_RESUMING,
    ),
    Fault(
        "a checkpoint's name is given before its files are fsynced",
        "megatron_coe/utils/fsynced.py",
        "os.fsync(self._file.fileno())",
        "self._file.fileno()",
        OF_SAVING,
    ),
    Fault(
        "bad checkpoints of a later step count among the newest",
        "megatron_coe/checkpoint/directory.py",
        "if _step(path) > step:",
        "if False:",
        OF_FOLDERS,
    ),
    Fault(
        "checkpoints that cannot be loaded count among the newest",
        "megatron_coe/checkpoint/directory.py",
        "elif is_loadable(path):",
        "else:",
        OF_FOLDERS,
    ),
    Fault(
        "what was found bad on resuming is taken for good when it is passed",
        "megatron_coe/checkpoint/checkpointer.py",
        "not was_refused and is_loadable(checkpoint)",
        "is_loadable(checkpoint)",
        OF_SAVING,
    ),
    Fault(
        "a run does not know which checkpoint it resumed from",
        "megatron_coe/training/build.py",
        "checkpointer.resume_from(start.path)",
        "pass",
        OF_PRETRAINING,
    ),
    Fault(
        "the index of a newer torch is left to torch",
        "megatron_coe/megatron_compat/checkpoints.py",
        "    reader.read_metadata = read_metadata\n",
        "",
        OF_VERSIONS,
    ),
    Fault(
        "more properties of a tensor than are known are dropped unseen",
        "megatron_coe/checkpoint/safe_unpickle.py",
        "if len(state) > max(known, 6):",
        "if False:",
        OF_VERSIONS,
    ),
    Fault(
        "one form of the format file is refused",
        "megatron_coe/checkpoint/safe_unpickle.py",
        "if content not in (FORMAT, FORMAT | _COMMON_FORMAT):",
        "if content != FORMAT:",
        OF_VERSIONS,
    ),
    Fault(
        "a damaged index is read by ranks that have not compared it",
        "megatron_coe/checkpoint/verify.py",
        "part, parts, (INDEX_FILE, COMMON_FILE, FORMAT_FILE))",
        "part, parts)",
        OF_VERSIONS,
    ),
    Fault(
        "a checkpoint whose replacement has not got its name is lost",
        "megatron_coe/checkpoint/directory.py",
        "            removed.rename(final)",
        "            pass",
        OF_FOLDERS,
    ),
    Fault(
        "objects of a checkpoint are unpickled whatever they are",
        "megatron_coe/checkpoint/safe_unpickle.py",
        'torch.load(file, map_location="cpu", weights_only=True)',
        'torch.load(file, map_location="cpu", weights_only=False)',
        OF_RESUMING,
    ),
    Fault(
        "what is inside an extra state is not looked at",
        "megatron_coe/checkpoint/safe_unpickle.py",
        "if _EXTRA_STATE in key:",
        "if False:",
        OF_RESUMING,
    ),
    Fault(
        "the digest of a file leaves out most of what is written",
        "megatron_coe/utils/fsynced.py",
        "self._digest.update(view)",
        "self._digest.update(view[:4096])",
        ("tests/unit/utils/test_fsynced.py",),
    ),
    Fault(
        "empty documents stay among the examples",
        DATASETS,
        "indices = indexed_indices[np.concatenate(list(has_tokens))[indexed_indices]]",
        "indices = indexed_indices",
        OF_DATA,
    ),
    Fault(
        "as many sequences as documents pass for one of each",
        INDEXED,
        "split=most > 1",
        "split=sequences != boundaries - 1",
        OF_DATA,
    ),
    Fault(
        "the tokens are no part of a data set's identity",
        INDEXED,
        'for suffix in ("idx", "bin"):',
        'for suffix in ("idx",):',
        OF_INDICES,
    ),
    Fault(
        "a training set that was renamed counts as another",
        "megatron_coe/checkpoint/resume_policy.py",
        "if _without_name(pair[0]) != _without_name(pair[1])",
        "if pair[0] != pair[1]",
        ("tests/unit/checkpoint/test_resume_policy.py",),
    ),
    Fault(
        "the last tokens stay where position decides",
        "megatron_coe/model/moe/capacity.py",
        "routing_map_TN * tokens - place_T1",
        "routing_map_TN * tokens + place_T1",
        OF_ROUTER,
    ),
    Fault(
        "each layer's heatmap has a scale of its own",
        "megatron_coe/analysis/heatmaps.py",
        '"vmax": scale.most,',
        '"vmax": matrices[0].max(),',
        ("tests/unit/analysis/test_plotting.py",),
    ),
    Fault(
        "another seed on resume is only said",
        "megatron_coe/checkpoint/resume_policy.py",
        '("train.seed", _REFUSED)',
        '("train.seed", _PRINTED)',
        ("tests/unit/checkpoint/test_resume_policy.py",),
    ),
    Fault(
        "a pickle in an index cache is left to Megatron",
        INDEX_CACHE,
        'np.load(path, mmap_mode="r", allow_pickle=False)',
        "pass",
        OF_INDICES,
    ),
    Fault(
        "an index cache is taken without its digests",
        INDEX_CACHE,
        "if expected[name] != _digest(path):",
        "if name not in expected:",
        OF_INDICES,
    ),
    Fault(
        "offsets of an index are not compared",
        INDEXED,
        "wrong = np.flatnonzero(offsets[after] != expected)",
        "wrong = np.flatnonzero(offsets[after] < 0)",
        OF_INDICES,
    ),
    Fault(
        "ids are checked at the start alone",
        INDEXED,
        "wrong = _first_wrong(ids, self._tokenizer.vocab_size)",
        "wrong = None",
        OF_INDICES,
    ),
    Fault(
        "co-activation with the iterations exchanged",
        ROUTING,
        "pairs = first_TA[:, :, None].astype(np.int64) * columns + second_TB[:, None, :]",
        "pairs = second_TB[:, :, None].astype(np.int64) * columns + first_TA[:, None, :]",
        ("tests/unit/analysis/test_routing.py",),
    ),
    Fault(
        "tokens of two sequences are neighbors",
        ROUTING,
        "together = sequence_T[distance:] == sequence_T[:-distance]",
        "together = sequence_T[distance:] >= sequence_T[:-distance]",
        ("tests/unit/analysis/test_routing.py",),
    ),
    Fault(
        "a p of 0",
        MUTUAL_INFORMATION,
        "p=float((1 + (shuffled >= information).sum()) / (1 + permutations)),",
        "p=float((shuffled >= information).sum() / permutations),",
        ("tests/unit/analysis/test_mutual_information.py",),
    ),
    Fault(
        "shuffles within a label leave all in place",
        MUTUAL_INFORMATION,
        "result[order] = order[np.lexsort((generator.random(len(order)), sorted_T))]",
        "result[order] = order",
        ("tests/unit/analysis/test_mutual_information.py",),
    ),
    Fault(
        "padding is taken for text",
        COLLECT,
        "indices, probs = (part.cpu()[:, :, is_token_T] for part in parts)",
        "indices, probs = (part.cpu() for part in parts)",
        ("tests/unit/analysis/test_collect.py",),
    ),
    Fault(
        "answers are not escaped",
        "megatron_coe/analysis/report.py",
        "autoescape=True,",
        "autoescape=False,",
        ("tests/functional/test_analysis.py",),
    ),
    Fault(
        "routing is counted twice under recomputation",
        ROUTER,
        "return self.routing_counts is not None and self.training and torch.is_grad_enabled()",
        "return self.routing_counts is not None and self.training",
        OF_ROUTING_STATS,
    ),
    Fault(
        "iterations are counted as one",
        ROUTER,
        "self.routing_counts[self.iteration] += torch.cat(",
        "self.routing_counts[0] += torch.cat(",
        OF_ROUTING_STATS,
    ),
    Fault(
        "told padding is counted",
        ROUTER,
        """            routing_map = routing_map & ~padding_mask[:, None]
            topk_mass_T""",
        "            topk_mass_T",
        OF_ROUTING_STATS,
    ),
    Fault(
        "copies of a tensor-parallel gradient all count",
        "megatron_coe/training/grad_norms.py",
        "if param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(",
        "if param_is_not_shared(weight) or param_is_not_tensor_parallel_duplicate(",
        OF_METRICS,
    ),
    Fault(
        "replicas of a gradient all count",
        "megatron_coe/training/grad_norms.py",
        "squares[group] += get_total_norm(gradients).double().square() / holders",
        "squares[group] += get_total_norm(gradients).double().square()",
        OF_METRICS,
    ),
    Fault(
        "only this rank's routing is reported",
        "megatron_coe/model/moe/routing_stats.py",
        "        torch.distributed.all_reduce(table)\n",
        "",
        OF_METRICS,
    ),
    Fault(
        "a certain loss counts as undecided",
        "experiments/claims.py",
        "elif interval.low > bound:",
        "elif interval.high > bound + 1:",
        OF_EXPERIMENTS,
    ),
    Fault(
        "a margin of nothing",
        "experiments/claims.py",
        "bound = MARGIN * sum(reference) / len(reference)",
        "bound = 0 * sum(reference) / len(reference)",
        OF_EXPERIMENTS,
    ),
    Fault(
        "a standard deviation for a standard error",
        "megatron_coe/analysis/intervals.py",
        "* deviation / math.sqrt(count)",
        "* deviation",
        OF_EXPERIMENTS,
    ),
    Fault(
        "controls decide",
        "experiments/claims.py",
        "for finding in findings if not finding.control]",
        "for finding in findings]",
        OF_EXPERIMENTS,
    ),
    Fault(
        "the best learning rate may be the highest tried",
        "experiments/learning_rates.py",
        "if best == max(losses):",
        "if best > max(losses):",
        ("tests/unit/experiments/test_tuned.py",),
    ),
    Fault(
        "learning rates are chosen on the report's rows",
        "experiments/tuned.py",
        "rows = self.data.tuning if held_out == TUNING else self.data.report",
        "rows = self.data.report",
        ("tests/unit/experiments/test_tuned.py",),
    ),
    Fault(
        "a screened chain normalizes once",
        "experiments/designs.py",
        "u = self.norms[t](x) if design.stream or (design.norms and t) else x",
        "u = self.norms[t](x) if design.stream else x",
        ("tests/unit/experiments/test_designs.py",),
    ),
    Fault(
        "a placement is measured on the tokens that chose it",
        "megatron_coe/analysis/placement.py",
        "measured = affinity(indices_CTK[:, ~chooses_T], N)",
        "measured = affinity(indices_CTK[:, chooses_T], N)",
        ("tests/unit/analysis/test_placement.py",),
    ),
    Fault(
        "routers keep the order of experts that are placed",
        "megatron_coe/conversion/place.py",
        "if weight.layer is not None and (weight.experts or _is_of_router(weight)):",
        "if weight.layer is not None and weight.experts:",
        ("tests/unit/conversion/test_place.py",),
    ),
    Fault(
        "deeper models keep the others' layers",
        "experiments/scales.py",
        'preset.model["num_layers"] * self.layers // _PAPER_LAYERS',
        "self.layers",
        ("tests/unit/experiments/test_plans.py",),
    ),
    Fault(
        "all seeds are one",
        "experiments/scales.py",
        "settings.train.seed = seed",
        "settings.train.seed = settings.train.seed",
        ("tests/unit/experiments/test_plans.py",),
    ),
    Fault(
        "a run of other settings is taken for this one",
        "megatron_coe/analysis/run_jobs.py",
        "if before != now:",
        "if not before:",
        ("tests/functional/test_run_experiment.py",),
    ),
    Fault(
        "variants in bf16 held to the precision of their fp32 gradients",
        "benchmarks/agreement.py",
        "tolerance = TOLERANCES[dtype]",
        "tolerance = TOLERANCES[ours[name].dtype]",
        ("tests/unit/benchmarks/test_measures.py",),
    ),
    Fault(
        "one router for all iterations counts them together in the global loss",
        "megatron_coe/model/field_rules.py",
        'if "global_aux_loss" in kinds and shared:',
        'if "global_aux_loss" in kinds and False:',
        ("tests/unit/model/test_config.py",),
    ),
    Fault(
        "settings in a checkpoint that was moved do not name it",
        "megatron_coe/config/locations.py",
        'places: Sections = {"checkpoint": {"load": str(step)}}',
        'places: Sections = {"checkpoint": {}}',
        ("tests/unit/config/test_locations.py",),
    ),
    Fault(
        "a checkpoint is deleted whose settings the command names",
        "megatron_coe/checkpoint/directory.py",
        "if is_between and path.resolve() not in holding:",
        "if is_between:",
        OF_SAVING,
    ),
    Fault(
        "fine-tuning goes on from the step of the checkpoint",
        "megatron_coe/checkpoint/state.py",
        "    if weights_only:\n        progress = Progress()\n",
        "",
        ("tests/unit/checkpoint/test_state.py",),
    ),
    Fault(
        "a tokenizer of other ids is taken",
        "megatron_coe/checkpoint/tokenizer.py",
        "if path != own and (difference",
        "if False and (difference",
        OF_CARRIED,
    ),
    Fault(
        "a file is added to a checkpoint's tokenizer unseen",
        "megatron_coe/checkpoint/manifest.py",
        "return is_carried or name",
        "return name",
        OF_CARRIED,
    ),
    Fault(
        "a batch grows a step too late",
        "megatron_coe/config/schedules.py",
        "return samples * ((self.final",
        "return max(0, samples - 1) * ((self.final",
        ("tests/unit/config/test_schedules.py",),
    ),
    Fault(
        "a schedule of samples goes on by steps",
        "megatron_coe/config/schedules.py",
        "return samples if self.in_samples else step",
        "return step",
        OF_SETUP,
    ),
    Fault(
        "the gradients of a small batch are divided by the positions of a full one",
        "megatron_coe/training/step.py",
        "self.update.begin(positions)",
        "self.update.begin(self._train.global_batch_size * self._train_state.provider.seq_length)",
        ("tests/unit/training/test_step.py",),
    ),
    Fault(
        "data that is held out is trained on, too",
        DATASETS,
        "parts = [None if whole is None else self.config.part for whole in split]",
        "parts = split",
        OF_DATA,
    ),
    Fault(
        "a smaller batch finds the training data at their end",
        "megatron_coe/training/build.py",
        'return max(planned, batches.samples_after(left, progress.get("samples", 0)))',
        "return planned",
        ("tests/functional/test_fine_tune.py",),
    ),
    Fault(
        "a rank's waiting counts as its work",
        "megatron_coe/training/step_metrics.py",
        "work_s = seconds - self._collectives.seconds() if",
        "work_s = seconds if",
        ("tests/unit/training/test_straggler.py",),
    ),
    Fault(
        "a sink may end the run's output with its own errors",
        "megatron_coe/training/sinks.py",
        "except BaseException as error:  # wandb",
        "except ValueError as error:  # wandb",
        ("tests/unit/training/test_sinks.py",),
    ),
    Fault(
        "what is known later is dropped with the steps before it",
        "megatron_coe/utils/metrics_file.py",
        "            dropped.append(record)\n",
        "            break\n",
        ("tests/unit/training/test_metrics_logger.py",),
    ),
    Fault(
        "a checkpoint that is to be exported may be deleted",
        "megatron_coe/training/hf_export.py",
        "return [job.checkpoint for job in (self._job, self._waiting) if job]",
        "return [job.checkpoint for job in (self._job,) if job]",
        ("tests/unit/training/test_hf_export.py",),
    ),
    Fault(
        "prompts of a batch are padded on the right",
        "megatron_coe/analysis/exact_match.py",
        "rows = [[padding or 0] * (longest - len(ids)) + ids for ids in prompts]",
        "rows = [ids + [padding or 0] * (longest - len(ids)) for ids in prompts]",
        ("tests/unit/analysis/test_exact_match.py",),
    ),
    Fault(
        "vLLM's model has an expert's gate and up projections exchanged",
        "megatron_coe/integrations/vllm/weights.py",
        '"gate_proj": "w1", "up_proj": "w3"',
        '"gate_proj": "w3", "up_proj": "w1"',
        ("tests/unit/integrations/test_vllm.py",),
    ),
    Fault(
        "a server listens to the network",
        "megatron_coe/cli/serve.py",
        'LOOPBACK = "127.0.0.1"',
        'LOOPBACK = "0.0.0.0"',
        ("tests/unit/cli/test_serve.py",),
    ),
    Fault(
        "a model with MTP layers does not know their names as it loads",
        HF_MODEL,
        "self._keys_to_ignore_on_load_unexpected = [config.mtp_weights]",
        "pass",
        OF_MTP,
    ),
    Fault(
        "an output layer of MTP's own is dropped unseen",
        "megatron_coe/conversion/weight_transfer.py",
        "_refuse_other(copy, reader, weight, parts[0])",
        "pass",
        OF_MTP,
    ),
    Fault(
        "the first pattern of train.lr_mult that matches counts",
        "megatron_coe/model/learning_rates.py",
        "return matching[-1] if",
        "return matching[0] if",
        ("tests/unit/model/test_learning_rates.py",),
    ),
    Fault(
        "the end of a multiplied learning rate is not multiplied",
        SETUP,
        '"min_lr": train.min_lr * factor',
        '"min_lr": train.min_lr',
        ("tests/unit/model/test_learning_rates.py",),
    ),
    Fault(
        "Muon takes gate over up of an expert for one matrix",
        "megatron_coe/distributed/muon.py",
        "parts = list(self.weight.split(update[None] if is_one_expert else update))",
        "parts = list(update[None] if is_one_expert or update.dim() == 2 else update)",
        OF_MUON,
    ),
    Fault(
        "Muon orthogonalizes a rank's shard of a matrix",
        "megatron_coe/distributed/muon.py",
        "whole = self._gathered(stacked, shape)",
        "whole = stacked",
        ("tests/distributed/test_muon.py",),
    ),
    Fault(
        "Muon updates routers",
        "megatron_coe/model/matrices.py",
        'and ".router." not in name',
        "and True",
        OF_MUON,
    ),
]
