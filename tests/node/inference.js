// Calls a batcher by the Open Inference Protocol using only the proto: node inference.js PROTO ADDRESS
// Its model "adder" adds the FP32 [rows, 2] "a" and "b". Prints a line of JSON for each thing it asks.
'use strict';

const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [proto, address] = process.argv.slice(2);
const { inference } = grpc.loadPackageDefinition(protoLoader.loadSync(proto, { keepCase: true, longs: String, defaults: true }));
const client = new inference.GRPCInferenceService(address, grpc.credentials.createInsecure());

const call = (method, request) =>
  new Promise((resolve) => {
    client[method](request, (error, response) =>
      resolve(error ? { code: grpc.status[error.code], details: error.details } : response),
    );
  });

const bytesOf = (values) => Buffer.from(new Float32Array(values).buffer);
const floatsIn = (bytes) => Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readFloatLE(4 * index));

const values = { a: [1, 2], b: [10, 20] };
const tensor = (name) => ({ name, datatype: 'FP32', shape: [1, 2] });
const raw = (id, model_name = 'adder') => ({
  id,
  model_name,
  inputs: Object.keys(values).map(tensor),
  raw_input_contents: Object.values(values).map(bytesOf),
});
const typed = (id) => ({
  id,
  model_name: 'adder',
  inputs: Object.entries(values).map(([name, fp32_contents]) => ({ ...tensor(name), contents: { fp32_contents } })),
});

function read({ id, parameters, outputs, raw_output_contents }) {
  const named = outputs.map(({ name, shape }, index) => [name, { shape, values: floatsIn(raw_output_contents[index]) }]);
  return { id, step: parameters.step.int64_param, outputs: Object.fromEntries(named) };
}

// Sends all requests at once; returns what became of each, in the order of the answers.
function stream(requests) {
  return new Promise((resolve, reject) => {
    const answers = [];
    const stream = client.ModelStreamInfer();
    stream.on('data', ({ error_message, infer_response }) =>
      answers.push(error_message ? { error: error_message } : read(infer_response)),
    );
    stream.on('error', reject);
    stream.on('end', () => resolve(answers));
    for (const request of requests) stream.write(request);
    stream.end();
  });
}

async function main() {
  const results = [
    await call('ModelReady', { name: 'adder' }),
    await call('ModelMetadata', { name: 'adder' }),
    read(await call('ModelInfer', raw('raw'))),
    read(await call('ModelInfer', typed('typed'))),
    await call('ModelInfer', raw('', 'resnet')),
    await stream([raw('0'), raw('1', 'resnet'), raw('2')]),
  ];
  client.close();
  for (const result of results) console.log(JSON.stringify(result));
}

main();
