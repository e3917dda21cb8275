"""The modules that a model is built of, by backend, and `prepare` for the machine it runs on."""

from megatron_coe.model.backends.select import prepare as prepare
