// Ranks with llama.cpp: `node llama_rank.mjs NODE_MODULES MODEL.gguf TEMPLATE THREADS`; a JSON array of [query, documents] a line in, of probabilities out.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [folder, model, template, threads] = process.argv.slice(2);
const path = createRequire(folder + "/").resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(path));
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"});
const loaded = await llama.loadModel({modelPath: model});
const context = await loaded.createRankingContext({contextSize: 4096, batchSize: 4096, threads: Number(threads), template});
console.log("ready");
for await (const line of createInterface({input: process.stdin})) {
    const found = [];
    for (const [query, documents] of JSON.parse(line))
        found.push(await context.rankAll(query, documents));
    console.log(JSON.stringify(found));
}
process.exit(0);
