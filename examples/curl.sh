#!/usr/bin/env bash
# A paid prompt by hand: prices, a quote, a 402 with an invoice, the payment, the answer.
#
#     satherd up                                      # in another terminal
#     bash examples/curl.sh http://127.0.0.1:8000
#     bash examples/curl.sh http://127.0.0.1:8000 "Tell me a story about a fox."
#
# Needs curl and python3 (to read JSON). Pays with simulated money, so it stops on a router that takes
# real money: there, pay the invoice with your own wallet and put its preimage in place of step 4.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,9{s/^#//;s/^ //;p}' "$0"
    exit 0
fi
router="${1:-${SATHERD_ROUTER_URL:-http://127.0.0.1:8000}}"
words="${2:-What is the capital of France?}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

# field FILE PATH: a value out of a JSON file, such as `field info.json models.0.id`
field() {
    python3 -c '
import json, sys
value = json.load(open(sys.argv[1]))
for name in sys.argv[2].split("."):
    value = value[int(name) if name.isdigit() else name]
print(value)' "$folder/$1" "$2"
}

step() { printf '\n\033[1m%s\033[0m\n' "$*" >&2; }

step "1. What does it cost?   GET /info"
curl -sS --fail-with-body "$router/info" -o "$folder/info.json"
python3 - "$folder/info.json" <<'PYTHON'
import json, sys
info = json.load(open(sys.argv[1]))
print("network", info["network"], "(simulated money)" if info["simulated"] else "(real money)")
for model in info["models"]:
    print(model["id"], model["kind"], json.dumps(model["fees"]))
PYTHON
if [[ "$(field info.json simulated)" != "True" ]]; then
    echo "this router takes real money; see the top of this file" >&2
    exit 1
fi

# The first text model; the request is the same bytes each time, as a credential stands for one request.
python3 - "$folder" "$words" <<'PYTHON'
import json, sys
folder, words = sys.argv[1:]
models = json.load(open(f"{folder}/info.json"))["models"]
model = next(model["id"] for model in models if model["kind"] == "text")
request = {"model": model, "max_tokens": 60, "messages": [{"role": "user", "content": words}]}
json.dump(request, open(f"{folder}/request.json", "w"))
json.dump({"kind": "chat", **request}, open(f"{folder}/job.json", "w"))
PYTHON

step "2. And this prompt?   POST /quotes (nothing is owed)"
curl -sS --fail-with-body "$router/quotes" -H 'Content-Type: application/json' \
    --data-binary "@$folder/job.json" -o "$folder/quote.json"
echo "fee $(field quote.json offer_msat) msat for $(field quote.json prompt_tokens) prompt tokens" \
    "and at most $(field quote.json max_tokens) more, place $(field quote.json queue.position)"

step "3. Ask without paying   POST /v1/chat/completions -> 402"
status="$(curl -sS "$router/v1/chat/completions" -H 'Content-Type: application/json' \
    --data-binary "@$folder/request.json" \
    -D "$folder/headers.txt" -o "$folder/challenge.json" -w '%{http_code}')"
if [[ "$status" != "402" ]]; then
    echo "expected 402, got $status:" >&2
    cat "$folder/challenge.json" >&2
    exit 1
fi
challenge="$(grep -i '^www-authenticate: *L402' "$folder/headers.txt" | head -n 1 | tr -d '\r')"
token="$(sed -E 's/.*token="([^"]+)".*/\1/' <<<"$challenge")"
invoice="$(sed -E 's/.*invoice="([^"]+)".*/\1/' <<<"$challenge")"
echo "402 Payment Required"
echo "invoice ${invoice:0:60}…"

step "4. Pay the invoice   POST /simulated/pay (with real money, this is what your wallet does)"
python3 -c 'import json, sys; print(json.dumps({"invoice": sys.argv[1]}))' "$invoice" |
    curl -sS --fail-with-body "$router/simulated/pay" -H 'Content-Type: application/json' \
        --data-binary @- -o "$folder/paid.json"
preimage="$(field paid.json preimage)"
echo "paid (simulated); the preimage is the receipt: ${preimage:0:8}…"

step "5. The same request, with the receipt   Authorization: L402 token:preimage"
# The credential goes through a file, since a command line can be read by everybody on the machine.
printf 'header = "Authorization: L402 %s:%s"\n' "$token" "$preimage" >"$folder/credential"
curl -sS --fail-with-body --config "$folder/credential" "$router/v1/chat/completions" \
    -H 'Content-Type: application/json' --data-binary "@$folder/request.json" \
    -D "$folder/headers.txt" -o "$folder/answer.json"
field answer.json choices.0.message.content
grep -i '^x-satherd-\(fee\|refund\)' "$folder/headers.txt" | tr -d '\r' || true

step "6. Again: the same job and answer, and no second charge"
curl -sS --fail-with-body --config "$folder/credential" "$router/v1/chat/completions" \
    -H 'Content-Type: application/json' --data-binary "@$folder/request.json" \
    -o "$folder/again.json"
if [[ "$(field again.json id)" != "$(field answer.json id)" ]]; then
    echo "that was another job" >&2
    exit 1
fi
echo "same job"

step "7. The change lies on the payment's account   GET /balance"
curl -sS --fail-with-body --config "$folder/credential" "$router/balance"
echo
