"""PublishedToHub: a model pushed to the hub with its card."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard
from transformers import PreTrainedModel

from layalign.model_card import MARK, NAME, model_card, write_card

if TYPE_CHECKING:
    from layalign import LayAlignProcessor


class PublishedToHub(PreTrainedModel):
    """A model whose card says what is known of it."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: LayAlignProcessor | None = None,
        card: ModelCard | None = None,
        evaluations: Sequence[str | PathLike] = (),
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Upload the trained part, its settings, its card and, where given, its processor; bases that are folders stay where they are.

        Args:
            repo_id: "owner/name"; made where it does not exist.
            processor: pushed with the model, so that others need nothing else.
            card: the model card; None: one of `layalign.model_card.model_card`, which knows nothing of the training.
            evaluations: folders that `layalign evaluate` wrote, for that card.
            private, token, revision, create_pr, commit_message: as in transformers.
            kwargs: of `save_pretrained`.

        Returns:
            The commit's address.

        Raises:
            ValueError: a card and evaluations, or a folder without a finished one.
        """
        if card is not None and evaluations:
            raise ValueError(
                "card and evaluations: evaluations are for the card that is written here; give one of both"
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            if processor is not None:
                processor.save_pretrained(folder)
            path = Path(folder) / NAME
            path.unlink(missing_ok=True)
            write_card(folder, model_card(self, repo_id, evaluations=evaluations) if card is None else card)
            if card is None and self._has_card(api, repo_id, revision):
                path.unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload LayAlign model",
            )
        return str(commit)

    @staticmethod
    def _has_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
        """Whether someone has written a card there, which stays."""
        if not api.file_exists(repo_id, NAME, revision=revision):
            return False
        file = api.hf_hub_download(repo_id, NAME, revision=revision)
        return MARK not in Path(file).read_text(encoding="utf-8")
