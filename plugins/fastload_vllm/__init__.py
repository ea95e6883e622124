"""vLLM: ``--load-format fastload`` streams the weights, verified, while the model is being built.

vLLM calls :func:`register` in every process it starts (entry-point group ``vllm.general_plugins``).
"""


def register() -> None:
    """Make ``fastload`` a load format. Cheap, and harmless when repeated."""
    from vllm.model_executor import model_loader

    if "fastload" not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        from .loader import FastloadModelLoader

        model_loader.register_model_loader("fastload")(FastloadModelLoader)
