"""The sentencepiece tokenizer of kan-train: decode(encode(text)) is the text for every text, and no text is ever read as a special token."""

import shutil
from pathlib import Path

import sentencepiece
from transformers import PreTrainedTokenizer

_SPACE, _ESCAPE = "\u2581", "\ue001"  # sentencepiece writes a space as U+2581: a text's own one is escaped, and so is the escape
UNKNOWN, BOUNDARY = 0, 1


class KanTokenizer(PreTrainedTokenizer):
    """Token 1 begins every document and so ends the one before: bos and eos. Token 0, which no text gives, is the padding."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs) -> None:
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor()
        self.processor.load_from_serialized_proto(Path(vocab_file).read_bytes())
        unknown, boundary = self.processor.id_to_piece(UNKNOWN), self.processor.id_to_piece(BOUNDARY)
        special = {"bos_token": boundary, "eos_token": boundary, "unk_token": unknown, "pad_token": unknown}
        super().__init__(**{**special, "clean_up_tokenization_spaces": False, **kwargs})

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.processor.id_to_piece(token): token for token in range(self.vocab_size)} | self.added_tokens_encoder

    def tokenize(self, text: str, *args, **kwargs) -> list[str]:
        return [self.processor.id_to_piece(token) for token in self.processor.encode(_escaped(text))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._text([self._convert_token_to_id(token) for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, *args, **kwargs) -> str:
        tokens = [token_ids] if isinstance(token_ids, int) else [int(token) for token in token_ids]
        if skip_special_tokens:
            return self._text([token for token in tokens if token not in self.all_special_ids])
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in self.all_special_ids:
                parts += [self._text(run), self.convert_ids_to_tokens(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._text(run)])

    def _text(self, tokens: list[int]) -> str:
        text = self.processor.decode([token for token in tokens if token < self.vocab_size and token not in (UNKNOWN, BOUNDARY)])
        return text.replace(_ESCAPE + "s", _SPACE).replace(_ESCAPE + "e", _ESCAPE)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """The boundary before every text."""
        return [BOUNDARY, *token_ids_0, *([BOUNDARY, *token_ids_1] if token_ids_1 is not None else [])]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        tokens = token_ids_0 if already_has_special_tokens else self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(token in self.all_special_ids) for token in tokens]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names["vocab_file"])
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)


def _escaped(text: str) -> str:
    return text.replace(_ESCAPE, _ESCAPE + "e").replace(_SPACE, _ESCAPE + "s")
