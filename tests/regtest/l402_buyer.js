'use strict';
// Buys at a 402 with a client that is none of ours, the npm package @getalby/lightning-tools:
//     node l402_buyer.js MODULES URL BODY RPC_URL USER PASSWORD
// The wallet is one of our nodes. Prints one line of JSON.

const [modules, url, body, rpcUrl, user, password] = process.argv.slice(2);
const entry = require.resolve('@getalby/lightning-tools/402/l402', { paths: [modules] });
const { fetchWithL402 } = require(entry);

const wallet = {
  async payInvoice({ invoice }) {
    const credentials = Buffer.from(`${user}:${password}`).toString('base64');
    const answer = await fetch(rpcUrl, {
      method: 'POST',
      headers: { Authorization: `Basic ${credentials}` },
      body: JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'lnpay', params: { invoice } }),
    });
    const { result, error } = await answer.json();
    if (!result || !result.success) throw new Error(JSON.stringify(error || result));
    return { preimage: result.preimage };
  },
};

(async () => {
  const request = { method: 'POST', headers: { 'Content-Type': 'application/json' }, body };
  const answer = await fetchWithL402(url, request, { wallet });
  const { status, payment } = answer;
  console.log(JSON.stringify({ status, payment, text: await answer.text() }));
})();
