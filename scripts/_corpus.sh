# Sourced by the comparisons after _env.sh: makes the corpus that configs/gpt_mini.yaml trains on.
# shellcheck shell=bash

make_corpus() { # folder
  [[ -e $1/stdlib_text_document.idx ]] && return
  mkdir -p "$1"
  "$PYTHON" tools/build_corpus.py --output "$1"
  "$PYTHON" tools/train_tokenizer.py --input "$1/corpus.jsonl" --vocab-size 512 \
    --output-prefix "$1/tokenizer"
  "$PYTHON" tools/preprocess_data.py --input "$1/corpus.jsonl" --json-keys text \
    --output-prefix "$1/stdlib" --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model "$1/tokenizer.model" --append-eod
}
