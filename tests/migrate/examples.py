"""Old configs in the layouts that XTuner 0.2 and InternEvo read, written for these tests."""

XTUNER = """
import torch
from bitsandbytes.optim import PagedAdamW32bit
from datasets import load_dataset
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset.map_fns import alpaca_map_fn, alpaca_zh_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

size = "1_8b"
pretrained_model_name_or_path = f"internlm/internlm2-{size}"
use_varlen_attn = False
alpaca_en_path = "tatsu-lab/alpaca"
alpaca_zh_path = "data/中文.json"
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 1024 * 2
pack_to_max_length = True
sequence_parallel_size = 2
batch_size = 1
accumulative_counts = 16 // 2
accumulative_counts *= sequence_parallel_size
dataloader_num_workers = 0
max_epochs = 3
optim_type = PagedAdamW32bit
lr = 2e-4
betas = (0.9, 0.999)
weight_decay = 0
max_norm = 1
warmup_ratio = 0.03
save_steps = 500
save_total_limit = 2
evaluation_freq = 500
SYSTEM = SYSTEM_TEMPLATE.alpaca
evaluation_inputs = ["请介绍一下你自己", "Name three colours."]

tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path)
model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        trust_remote_code=True,
        torch_dtype=torch.float16,
        quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"),
)
common = dict(tokenizer=tokenizer, max_length=max_length, pack_to_max_length=pack_to_max_length)
alpaca_en = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=alpaca_en_path),
    dataset_map_fn=alpaca_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    shuffle_before_pack=True,
    **common,
)
alpaca_zh = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path="json", data_files=dict(train=alpaca_zh_path)),
    dataset_map_fn=alpaca_zh_map_fn,
    max_dataset_length=200,
    **common,
)
train_dataset = dict(type=ConcatDataset, datasets=[alpaca_en, alpaca_zh])
train_dataloader = dict(batch_size=batch_size, num_workers=dataloader_num_workers, dataset=train_dataset)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale="dynamic",
)
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=EvaluateChatHook, tokenizer=tokenizer, every_n_iters=evaluation_freq,
         evaluation_inputs=evaluation_inputs, system=SYSTEM, prompt_template=prompt_template),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit))
visualizer = None
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=7, deterministic=False)
"""

INTERNEVO = """
JOB_NAME = "7b_train"
SEQ_LEN = 2048
data = dict(
    seq_len=SEQ_LEN, micro_num=4, micro_bsz=2, pack_sample_into_one=False, total_steps=50, min_length=50,
    train_folder="data/tokenized/train", valid_folder=None, rampup_batch_size="",
)
model = dict(checkpoint=True, num_layers=32, hidden_size=4096, dtype="torch.bfloat16")
adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, weight_decay=0.01)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.01, eta_min=1e-5)
hybrid_zero_optimizer = dict(overlap_sync_grad=True, clip_grad_norm=1.0)
parallel = dict(zero1=dict(size=8), tensor=dict(size=2, mode="mtp"), pipeline=dict(size=1), weight=dict(size=1))
ckpt = dict(enable_save_ckpt=True, checkpoint_every=25, load_ckpt_info=dict(path="local:models/internlm2-7b"))
"""
