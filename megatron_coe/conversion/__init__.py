"""Training checkpoints to and from Hugging Face folders, on one CPU process, weight by weight.

export_hf.py           checkpoint -> folder
import_hf.py           folder -> checkpoint at step 0
upcycle.py             standard MoE model -> CoE model at step 0
place.py               experts of a model in another order, for expert-parallel ranks
stored_model.py        a model in files: settings, table of weights, how to read them
initial_checkpoint.py  a stored model -> checkpoint at step 0
weight_transfer.py     weights compared, read, checked and exported one at a time
distcp.py              tensors of Megatron's distributed checkpoints
safetensors_shards.py  tensors of Hugging Face folders
hf_config/             `config.json`
tokenizer.py           the tokenizer of an exported folder
model_card.py          its README.md
folders.py             new folders, and the JSON in them
malloc.py              the C library's allocator
"""
