// Calls a "repr" and a "dyna" batcher using only the proto: node client.js PROTO REPR_ADDRESS DYNA_ADDRESS [FOLDER]
// FOLDER contains authority.pem, client.key and client.pem, for mutual TLS.
// Prints a line of JSON for each stream: its answers, and the status it ended with.
'use strict';

const fs = require('fs');
const path = require('path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [proto, reprAddress, dynaAddress, folder] = process.argv.slice(2);
const [authority, key, certificate] = ['authority.pem', 'client.key', 'client.pem'].map(
  (name) => folder && fs.readFileSync(path.join(folder, name)),
);
const credentials = folder
  ? grpc.credentials.createSsl(authority, key, certificate)
  : grpc.credentials.createInsecure();
const { mukoe_batcher: contract } = grpc.loadPackageDefinition(protoLoader.loadSync(proto, { keepCase: true, defaults: true }));

// One stream: sends each request when the previous answer has arrived, and half-closes the stream after the last.
function exchange(address, requests) {
  return new Promise((resolve) => {
    const client = new contract.MukoeService(address, credentials);
    const call = client.ProcessRequest();
    const waiting = [...requests];
    const answers = [];
    const sendNext = () => (waiting.length ? call.write(waiting.shift()) : call.end());
    call.on('data', ({ result }) => {
      const dictionary = {};
      for (const { key, values } of result.dictionary) dictionary[key] = values.toString('hex');
      answers.push([dictionary, result.step]);
      sendNext();
    });
    call.on('error', () => {}); // reported by the status event
    call.on('status', ({ code, details }) => {
      client.close();
      resolve({ answers, code: grpc.status[code], details });
    });
    sendNext();
  });
}

const repr = (data) => ({ representations: { data: Buffer.from(data) } });
const dyna = (data, action) => ({ dynamics: { data: Buffer.from(data), action } });

async function main() {
  const numbered = Array.from({ length: 5 }, (_, number) => `${number}`);
  const results = [
    await exchange(reprAddress, [repr('hi')]), // like old clients: a stream per request
    await exchange(reprAddress, numbered.map(repr)), // several on one stream
    await exchange(reprAddress, [repr(Buffer.alloc(884736, 0x5a))]),
    await exchange(dynaAddress, [dyna('hi', 3), dyna('', -(2 ** 31)), dyna('x', 2 ** 31 - 1)]),
    await exchange(reprAddress, [dyna('hi', 3)]), // the wrong kind
    ...(await Promise.all(numbered.map((data) => exchange(reprAddress, [repr(data)])))),
  ];
  for (const result of results) console.log(JSON.stringify(result));
}

main();
