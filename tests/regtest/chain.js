'use strict';
// A bcoin full node on regtest, in memory and without a wallet: node chain.js BCOIN_FOLDER PORT KEY

const path = require('path');
const [folder, port, apiKey] = process.argv.slice(2);

// leveldown has to be compiled, and a chain in memory never touches it.
const id = require.resolve('leveldown', { paths: [folder] });
require.cache[id] = { id, filename: id, loaded: true, exports: class LevelDOWN {} };

// bcoin 1.0.2 writes regtest addresses with a prefix that nobody else uses any more.
const networks = require(path.join(folder, 'lib/protocol/networks'));
networks.regtest.addressPrefix.bech32 = 'bcrt';

const FullNode = require(path.join(folder, 'lib/node/fullnode'));
const node = new FullNode({
  network: 'regtest',
  memory: true,
  indexTx: true,
  listen: false,
  workers: false,
  httpHost: '127.0.0.1',
  httpPort: Number(port),
  apiKey,
  logConsole: true,
  logLevel: 'warning',
  logFile: false,
});

// In place of an internal error, over which Electrum hangs up every second.
node.rpc.calls.estimatesmartfee = async (args) => ({
  errors: ['Insufficient data or no feerate found'],
  blocks: args[0],
});

process.on('unhandledRejection', (error) => { throw error; });
process.on('SIGTERM', () => process.exit(0));
(async () => {
  await node.ensure();
  await node.open();
})();
