// A client that nobody here has written pays a router: @getalby/lightning-tools, whose folder is the
// first argument. The router's address is the second, the third is what it can read: "both" schemes
// of a 402, or "payment" for one that knows the Payment scheme only. One line of JSON comes out.
const [folder, router, knows] = process.argv.slice(2);
const { fetch402, fetchWithMpp } = await import(
  `file://${folder}/@getalby/lightning-tools/dist/esm/402.js`
);

const seen = [];
const plain = globalThis.fetch;
globalThis.fetch = async (url, options) => {
  const reply = await plain(url, options);
  seen.push([reply.status, new Headers(options?.headers).get("authorization")]);
  if (knows !== "payment" || reply.status !== 402) return reply;
  const [, payment] = reply.headers.get("www-authenticate").split(/, (?=Payment )/);
  const headers = new Headers(reply.headers);
  headers.set("www-authenticate", payment);
  return new Response(await reply.text(), { status: 402, headers });
};

let payments = 0;
const wallet = {
  async payInvoice({ invoice }) {
    payments += 1;
    const paid = await plain(`${router}/simulated/pay`, {
      method: "POST",
      body: JSON.stringify({ invoice }),
    });
    return { preimage: (await paid.json()).preimage };
  },
};
const request = {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({
    model: "test-model",
    messages: [{ role: "user", content: "Say hello to the world, please." }],
    max_tokens: 64,
  }),
};
const pay = knows === "payment" ? fetchWithMpp : fetch402;
const reply = await pay(`${router}/v1/chat/completions`, request, { wallet });
const again = await pay(`${router}/v1/chat/completions`, request, {
  wallet,
  credentials: reply.payment.credentials,
});
console.log(
  JSON.stringify({
    payments,
    seen,
    status: [reply.status, again.status],
    answers: [await reply.text(), await again.text()],
    receipt: reply.headers.get("payment-receipt"),
  }),
);
