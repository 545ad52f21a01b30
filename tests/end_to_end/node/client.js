// A client in Node.js that knows the server by its proto files alone: `node client.js PROTOS ADDRESS detect|stream FILE…`.
"use strict";

const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const [protos, address, what, ...files] = process.argv.slice(2);

const definition = protoLoader.loadSync("ai4thai/vision/v1/vision_service.proto", {
  includeDirs: [protos, path.join(protos, "third_party")],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
  defaults: true,
});
const vision = grpc.loadPackageDefinition(definition).ai4thai.vision.v1;
const client = new vision.VisionService(address, grpc.credentials.createInsecure(), {
  "grpc.max_send_message_length": 64 << 20,
  "grpc.max_receive_message_length": 64 << 20,
});

function fail(error) {
  console.error(`${error.code} ${error.details || error.message}`);
  process.exit(1);
}

// One unary call; prints its response.
function detect(file) {
  client.Detect({ image: { content: fs.readFileSync(file) } }, (error, response) => {
    if (error) fail(error);
    console.log(JSON.stringify(response));
    client.close();
  });
}

// One stream in both directions: the next frame is sent when the result of the one before has come, so that both sides
// are open at once. Prints every message, one a line.
function stream(waiting) {
  const call = client.DetectStream();
  let number = 0;
  const send = () => {
    if (waiting.length === 0) return call.end();
    call.write({ frame: { frame_id: String(number++), image: { content: fs.readFileSync(waiting.shift()) } } });
  };
  call.on("data", (message) => {
    console.log(JSON.stringify(message));
    if (message.message === "result") send();
  });
  call.on("error", fail);
  call.on("end", () => client.close());
  call.write({ config: { options: { min_confidence: 0.5 } } });
  send();
}

if (what === "detect") detect(files[0]);
else stream(files);
