"""Import this and transformers knows KAN models: `AutoModelForCausalLM.from_pretrained(FOLDER)` runs the code that is installed, not the folder's."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kan_train.export.remote.configuration_kan import KanConfig
from kan_train.export.remote.modeling_kan import KanCache, KanForCausalLM
from kan_train.export.remote.tokenization_kan import KanTokenizer

__all__ = ["KanCache", "KanConfig", "KanForCausalLM", "KanTokenizer"]

AutoConfig.register("kan", KanConfig, exist_ok=True)
AutoModelForCausalLM.register(KanConfig, KanForCausalLM, exist_ok=True)
AutoTokenizer.register(KanConfig, slow_tokenizer_class=KanTokenizer, exist_ok=True)
