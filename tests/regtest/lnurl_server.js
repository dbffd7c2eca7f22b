'use strict';
// An LNURL-pay server that is none of ours, the npm package `lnurl`, before one of our nodes:
//     node lnurl_server.js MODULES PORT RPC_URL USER PASSWORD EXPIRY_S NAME…
// Each NAME is a Lightning address (LUD-16), which the package leaves to whoever is in front of it.

const http = require('http');
const path = require('path');
const [modules, port, rpcUrl, user, password, expiry, ...names] = process.argv.slice(2);
const lnurl = require(path.join(modules, 'lnurl'));

const credentials = Buffer.from(`${user}:${password}`).toString('base64');

// What the package wants of a Lightning node.
class Electrum {
  async addInvoice(amount, { description }) {
    const params = { amount_msat: amount, expiry: Number(expiry), description_for_hash: description };
    const answer = await fetch(rpcUrl, {
      method: 'POST',
      headers: { Authorization: `Basic ${credentials}` },
      body: JSON.stringify({ jsonrpc: '2.0', id: 1, method: 'add_invoice', params }),
    });
    const { result, error } = await answer.json();
    if (!result) throw new Error(JSON.stringify(error));
    return { id: result.payment_hash, invoice: result.bolt11 };
  }
}

(async () => {
  const url = `http://127.0.0.1:${port}`;
  const server = lnurl.createServer({ listen: false, lightning: null, url });
  server.ln = new Electrum();
  const paths = {};
  for (const name of names) {
    const terms = {
      minSendable: 1000,
      maxSendable: 100000000000,
      metadata: JSON.stringify([['text/plain', `to ${name}`], ['text/identifier', `${name}@127.0.0.1`]]),
    };
    const made = await server.generateNewUrl('payRequest', terms, { uses: 0 });
    paths[`/.well-known/lnurlp/${name}`] = made.url.slice(url.length);
    console.log(name, made.encoded);
  }
  http
    .createServer((request, response) => {
      request.url = paths[request.url] || request.url;
      server.app(request, response);
    })
    .listen(Number(port), '127.0.0.1');
})();
