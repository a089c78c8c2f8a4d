// openai for Node and Vercel's ai.
import OpenAI from "openai";
import { generateText, generateObject, streamText, embedMany, tool, jsonSchema, stepCountIs } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

const [which, url, model, key, embedding] = process.argv.slice(2);
const baseURL = `${url}/v1`;
const messages = [{ role: "user", content: "hello there" }];
const schema = {
  type: "object",
  properties: { number: { type: "integer", minimum: 0, maximum: 999 } },
  required: ["number"],
  additionalProperties: false,
};
const must = (condition, what) => {
  if (!condition) throw new Error(`not what was asked for: ${JSON.stringify(what)}`);
};

const client = new OpenAI({ baseURL, apiKey: key, maxRetries: 0 });
const functionTool = { type: "function", function: { name: "get_order", parameters: schema } };
const ofOpenai = {
  chat: async () => must((await client.chat.completions.create({ model, messages })).choices[0].finish_reason),
  "chat streaming": async () => {
    const stream = await client.chat.completions.create({ model, messages, stream: true });
    let count = 0;
    for await (const _ of stream) count += 1;
    must(count);
  },
  tools: async () => {
    const given = { model, messages, tools: [functionTool], tool_choice: "required" };
    must((await client.chat.completions.create(given)).choices[0].message.tool_calls.length);
  },
  "structured output": async () => {
    const format = { type: "json_schema", json_schema: { name: "order", schema, strict: true } };
    const said = await client.chat.completions.create({ model, messages, response_format: format });
    must(Number.isInteger(JSON.parse(said.choices[0].message.content).number));
  },
  completions: async () => must((await client.completions.create({ model, prompt: "once" })).choices.length),
  models: async () => must((await client.models.list()).data.length),
  responses: async () => {
    const first = await client.responses.create({ model, input: "hello" });
    must((await client.responses.retrieve(first.id)).id === first.id);
    await client.responses.create({ model, input: "more", previous_response_id: first.id });
  },
  "responses streaming": async () => {
    const kinds = [];
    for await (const event of await client.responses.create({ model, input: "hello", stream: true })) kinds.push(event.type);
    must(["response.completed", "response.incomplete"].includes(kinds.at(-1)), kinds);
  },
  embeddings: async () => must((await client.embeddings.create({ model: embedding, input: ["a", "b"] })).data.length === 2),
};

const responses = createOpenAI({ baseURL, apiKey: key });
const compatible = createOpenAICompatible({ name: "steersman", baseURL, apiKey: key, supportsStructuredOutputs: true });
const order = tool({ description: "order", inputSchema: jsonSchema(schema), execute: async () => "shipped" });
const base = { maxRetries: 0, prompt: "hello" };
const calls = (chosen) => ({
  ...base,
  model: chosen,
  tools: { get_order: order },
  stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
});
const streamed = async (chosen) => {
  const parts = [];
  for await (const part of streamText({ ...base, model: chosen }).fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part.type);
  }
  must(parts.includes("finish"), parts);
};
const ofVercel = {
  chat: async () => must((await generateText({ ...base, model: compatible(model) })).finishReason),
  "chat streaming": () => streamed(compatible(model)),
  tools: async () => must((await generateText(calls(compatible(model)))).steps.length === 2),
  "structured output": async () =>
    must((await generateObject({ ...base, model: compatible(model), schema: jsonSchema(schema) })).object),
  responses: async () => must((await generateText({ ...base, model: responses(model) })).finishReason),
  "responses streaming": () => streamed(responses(model)),
  "responses tools": async () => must((await generateText(calls(responses(model)))).steps.length === 2),
  "responses structured output": async () =>
    must((await generateObject({ ...base, model: responses(model), schema: jsonSchema(schema) })).object),
  completions: async () => must((await generateText({ ...base, model: compatible.completionModel(model) })).finishReason),
  embeddings: async () => {
    const found = await embedMany({ model: compatible.embeddingModel(embedding), values: ["a", "b"], maxRetries: 0 });
    must(found.embeddings.length === 2);
  },
};

for (const [name, call] of Object.entries(which === "openai" ? ofOpenai : ofVercel)) {
  const outcome = { call: name };
  try {
    await call();
  } catch (error) {
    outcome.error = `${error.name}: ${error.message} ${error.responseBody ?? ""} ${error.cause ?? ""}`.slice(0, 600);
  }
  console.log(`RESULT ${JSON.stringify(outcome)}`);
}
