"""RUN/model on the Hugging Face Hub (``--push-to-hub NAME``)."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from bert_fast.output import Output
from bert_fast.run.config import ConfigError, PretrainConfig


def require_login(config: PretrainConfig, output: Output) -> None:
    """Makes the repository, so that what cannot be uploaded is known before the run and not at its end.

    Raises ConfigError where the name is none, no login is found or the Hub refuses; a Hub that is not reached is a
    warning.
    """
    name = config.push_to_hub
    if not name:
        return
    if get_token() is None:
        raise ConfigError(f"--push-to-hub {name} needs a login: run `hf auth login`, or set HF_TOKEN")
    try:
        validate_repo_id(name)
        _create(config)
    except (HFValidationError, OfflineModeIsEnabled) as error:
        raise ConfigError(f"--push-to-hub {name}: {error}") from error
    except Exception as error:  # the network's
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise ConfigError(f"--push-to-hub {name}: the Hub refuses it: {error}") from error
        output.warn(
            f"--push-to-hub {name}: the Hub is not reached ({error}); the upload is tried at the end all the same"
        )


def push(config: PretrainConfig, output: Output) -> bool:
    """Uploads RUN/model in one commit and returns whether that went well; a failure is a warning with what to do."""
    name, folder = config.push_to_hub, Path(config.out) / "model"
    assert name is not None  # else nothing is pushed
    try:
        _create(config)
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="A model of bert-fast pretrain")
    except Exception as error:  # the network's, the Hub's and the disk's: none of them may hide that the run is done
        again = f"hf upload {name} {folder}" + (" --private" if config.hub_private else "")
        output.warn(
            f"{folder} was not uploaded to {name} ({type(error).__name__}: {error}). The model is whole: the same "
            f"command again uploads it without training, and so does: {again}"
        )
        return False
    output.note(f"{folder} is on the Hub: {commit.commit_url}")
    return True


def _create(config: PretrainConfig) -> None:
    assert config.push_to_hub is not None  # asked by the caller
    HfApi().create_repo(config.push_to_hub, private=config.hub_private, exist_ok=True)
