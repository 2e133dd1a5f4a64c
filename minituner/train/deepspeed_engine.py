"""DeepSpeed behind the loop's interface: the same numbers as TorchEngine, with less memory on each rank.

Two ranks, ZeRO-2, the parameters A, B and C laid end to end and cut in two:

    rank 0   [A A A B | . . . .]     keeps averages and summed gradients for its half, updates it,
    rank 1   [. . . . | B C C C]     and all ranks gather the updated halves into a whole model again

What is done so that it equals TorchEngine, to rounding (tests/promises/test_zero_stages_are_equal.py):
    loss * world_size      DeepSpeed averages gradients over ranks; our terms are to be *summed* (see engines.py)
    one step a window      `managed_gradient_accumulation: false`: a shorter last window is a window too
    one AdamW              torch's, built by the same function, over DeepSpeed's pieces

Checkpoints stay ours: each parameter and its averages is gathered whole, one at a time, and rank 0 writes the same
safetensors files as without ZeRO. So a run may be resumed under another stage or none, on the same number of ranks;
under the same one it is bit-identical, and nothing of DeepSpeed's (pickles) is ever loaded. While saving, rank 0's main
memory holds 12 bytes per trained parameter. Before `prepare`, each rank holds the whole model. Lesson: notebook 07.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from minituner.errors import UsageError
from minituner.model.adapters import trainable_parameters
from minituner.recipe import Recipe
from minituner.train.engines import share_parameters
from minituner.train.optimizers import build_optimizer
from minituner.train.ranks import Ranks
from minituner.train.zero import deepspeed_config, import_deepspeed, join_deepspeed, stage_of

AVERAGES = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """ZeRO stages 1 to 3 on one rank or several; see `minituner.train.engines.Engine`."""

    def __init__(self, recipe: Recipe, device: str, ranks: Ranks | None = None) -> None:
        self.recipe, self.device, self.ranks = recipe, torch.device(device), ranks or Ranks()
        self.rank, self.world_size = self.ranks.world.rank, self.ranks.world.world_size
        self.stage = stage_of(recipe)
        self.sharded = self.stage == 3
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.model: Any = None
        self.engine: Any = None

    def prepare(self, model: Any) -> None:
        """Hand the model and its AdamW to DeepSpeed, which cuts them.

        Raises:
            UsageError: an optimizer whose state cannot be cut, or a DeepSpeed JSON that contradicts the recipe.
        """
        self.parameters = trainable_parameters(model)
        types = {parameter.dtype for parameter in self.parameters.values()}
        if torch.float16 in types:
            raise UsageError("distributed.zero: float16 would need loss scaling", fix="model.dtype=bfloat16 or float32")
        bfloat16 = torch.bfloat16 in types
        config = deepspeed_config(self.recipe, self.world_size, bfloat16=bfloat16)
        optimizer = build_optimizer(self.parameters, self.recipe.train)
        if type(optimizer) is not torch.optim.AdamW:
            raise UsageError(
                f"distributed.zero cannot cut the state of {type(optimizer).__name__} into pieces",
                fix="train.optimizer=adamw: cut over the ranks, its averages are small",
            )
        self._join()
        share_parameters(self.parameters, self.ranks)
        self.engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
        self.model = model  # called directly: what gathers parameters hangs on its layers

    def _join(self) -> None:
        """Meet in DeepSpeed's own communication layer; a rank that is alone makes a group of one."""
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
        # DeepSpeed reads which device is this rank's from torchrun's variable; Slurm sets none of that name.
        own = torch.cuda.current_device() if self.device.type == "cuda" else self.ranks.world.local_rank
        os.environ.setdefault("LOCAL_RANK", str(own))
        join_deepspeed()

    def backward(self, loss: torch.Tensor) -> None:
        """Add this micro-batch's gradients; `loss` is already divided by all ranks' supervised tokens of the window.

        The forward pass need not have gone through DeepSpeed's engine (the loss may be computed in pieces, by
        model/head.py): what its `forward` does before and after calling the model is done here.
        """
        from deepspeed.runtime.utils import register_output_backward_hooks

        self.engine.optimizer.clear_backward_seen_flag()
        loss = loss * self.world_size
        register_output_backward_hooks(loss, self.engine._backward_prologue)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip the global norm, update, clear the gradients; returns the norm before clipping.

        A norm that is not finite updates nothing (and is reported as infinite); the caller decides what follows.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    def skip(self) -> None:
        """Forget the gradients without an update: what DeepSpeed's own step does when they overflow."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            optimizer._pre_step()
            optimizer._overflow_clean_up(optimizer.loss_scale)
            return
        optimizer.micro_step_id = -1
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        else:
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
            optimizer.all_grad_tensors = dict.fromkeys(optimizer.all_grad_tensors)

    def all_sum(self, number: float) -> float:
        """The sum over all ranks (one rank: the number itself)."""
        return self.ranks.all_sums([number])[0]

    def all_sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all ranks, in one message."""
        return self.ranks.all_sums(numbers)

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters by name in float32, gathered one by one; all ranks call, rank 0 gets them."""
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered({name: lambda p=p: safe_get_full_fp32_param(p) for name, p in self.parameters.items()})

    def state(self) -> dict[str, torch.Tensor]:
        """AdamW's averages by parameter name, as TorchEngine has them; all ranks call, rank 0 gets them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self._flats()[0]
        inner = self.engine.optimizer.optimizer.state.get(flat, {})
        if "step" not in inner:  # nothing was updated yet
            return {}
        self._link_averages()
        averages = {
            f"{name}/{key}": lambda p=p, key=key: safe_get_full_optimizer_state(p, key)
            for name, p in self.parameters.items()
            for key in AVERAGES
        }
        steps = {f"{name}/step": lambda: inner["step"].clone() for name in self.parameters}
        return self._gathered(averages | steps)

    def _gathered(self, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Call each function on all ranks, in order, and keep what it returns on rank 0 only, in main memory."""
        kept = {}
        for name, gather in tensors.items():
            whole = gather()
            if self.ranks.is_main:
                kept[name] = whole.detach().cpu()
        return kept

    def _flats(self) -> list[torch.Tensor]:
        """The flat pieces that AdamW updates on this rank."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _link_averages(self) -> None:
        """Let each parameter find its stretch of the flat averages (stages 1 and 2).

        DeepSpeed 0.19 does so once, after the first step of the *first* group, when other groups have no averages yet.
        """
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def load_state(self, weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put saved averages back, and the float32 weights that bfloat16 parameters are rounded from.

        Raises:
            UsageError: without ZeRO, parameters had been updated unequally often, which flat pieces cannot say.
        """
        for name, parameter in self.parameters.items():
            self._put(parameter, weights[name])
        steps = {float(tensors[key]) if (key := f"{name}/step") in tensors else 0.0 for name in self.parameters}
        if steps == {0.0}:
            return
        if len(steps) > 1:
            raise UsageError(
                "this checkpoint cannot be resumed under ZeRO: some of its parameters never had a gradient",
                fix="resume with distributed.zero=null",
            )
        optimizer = self.engine.optimizer
        for flat in self._flats():
            # AdamW counts steps on the CPU, except its fused kernel, which reads the count beside the parameter.
            place = flat.device if optimizer.optimizer.defaults["fused"] else torch.device("cpu")
            optimizer.optimizer.state[flat] = {
                "step": torch.tensor(max(steps), dtype=torch.float32, device=place),
                **{key: torch.zeros_like(flat) for key in AVERAGES},
            }
        self._link_averages()
        for name, parameter in self.parameters.items():
            for key in AVERAGES:
                self._put(parameter, tensors[f"{name}/{key}"], key)

    def _put(self, parameter: torch.nn.Parameter, value: torch.Tensor, key: str | None = None) -> None:
        """Write this rank's piece of a whole tensor: of the parameter, or of one of its averages."""
        from deepspeed import utils

        if self.stage < 3:
            more = (key,) if key else ()
            (utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param)(parameter, value, *more)
            return
        # Pieces are equally long, the last one padded; the functions for whole tensors forget the padding.
        piece = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, piece * self.world_size - value.numel()))
        mine = padded[piece * self.rank : piece * (self.rank + 1)]
        if key:
            utils.safe_set_local_optimizer_state(parameter, mine, key)
        else:
            utils.safe_set_local_fp32_param(parameter, mine)

    def exported(self) -> dict[str, torch.Tensor] | None:
        """Stage 3: the whole tensors to write into `hf/`, gathered one by one; all ranks call, rank 0 gets them.

        None before stage 3, where the model on each rank is whole. Of a LoRA model only what is trained is gathered,
        and the embeddings, which peft saves with an adapter on them.
        """
        if self.stage < 3:
            return None
        module = self.model
        adapter = hasattr(module, "peft_config")
        ends = [part for part in (module.get_input_embeddings(), module.get_output_embeddings()) if part is not None]
        always = {id(parameter) for part in ends for parameter in part.parameters()}
        named = {
            name: parameter
            for name, parameter in module.named_parameters(remove_duplicate=False)
            if not adapter or parameter.requires_grad or id(parameter) in always
        }
        unique = {str(id(parameter)): lambda p=parameter: self._whole(p) for parameter in named.values()}
        whole = self._gathered(unique)
        if not self.ranks.is_main:
            return {}
        kept = set(module.state_dict())
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
        return {**{name: whole[str(id(parameter))] for name, parameter in named.items()}, **buffers}

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        with import_deepspeed().zero.GatheredParameters([parameter]):
            return parameter.detach().clone() if self.ranks.is_main else parameter.detach()[:0]

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model and leave the ranks; a rank that was alone has a whole model again."""
        if self.engine is None:
            return
        if self.stage == 3 and self.world_size == 1:
            for parameter in self.model.parameters():
                parameter.all_gather([parameter])
        self.engine.destroy()
        self.engine = None
        # Through DeepSpeed, which keeps groups in globals: the next run of this process would find dead ones.
        import_deepspeed().comm.destroy_process_group()
