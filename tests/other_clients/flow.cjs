// The official client for Node through a whole flow: node flow.cjs ROWS MODEL. Prints what it saw as one JSON object.
"use strict";
const fs = require("node:fs");
const OpenAI = require("openai");
const { toFile } = OpenAI;

async function main([rows, model]) {
  const client = new OpenAI({ maxRetries: 2 }); // address and key: from the environment
  const seen = {};
  const file = await client.files.create({ file: fs.createReadStream(rows), purpose: "fine-tune" });
  await client.files.waitForProcessing(file.id, { pollInterval: 200 });
  const unnamed = await client.files.create({ file: await toFile(fs.readFileSync(rows)), purpose: "fine-tune" });
  seen.unnamed = (await client.files.waitForProcessing(unnamed.id, { pollInterval: 200 })).status;
  seen.sameBytes = (await (await client.files.content(file.id)).text()) === fs.readFileSync(rows, "utf8");
  let listed = 0;
  for await (const each of client.files.list({ limit: 1 })) listed += each.object === "file" ? 1 : 0;
  seen.files = listed;

  let job = await client.fineTuning.jobs.create({
    model,
    training_file: file.id,
    suffix: "from node",
    metadata: { commit: "abc" },
    method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1, batch_size: "auto" } } },
  });
  seen.created = [job.object, job.status, job.metadata.commit];
  while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
    await new Promise((wake) => setTimeout(wake, 200));
    job = await client.fineTuning.jobs.retrieve(job.id);
  }
  seen.status = job.status;
  seen.error = job.error;
  seen.tuned = job.fine_tuned_model;

  seen.withNullMetadata = [];
  for await (const each of client.fineTuning.jobs.list({ metadata: null })) seen.withNullMetadata.push(each.id);
  seen.withMetadata = [];
  for await (const each of client.fineTuning.jobs.list({ metadata: { commit: "abc" } })) seen.withMetadata.push(each.id);
  seen.job = job.id;
  seen.events = new Set();
  for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 2 })) seen.events.add(event.type);
  seen.events = [...seen.events].sort();
  seen.checkpoints = [];
  for await (const each of client.fineTuning.jobs.checkpoints.list(job.id)) {
    seen.checkpoints.push(each.fine_tuned_model_checkpoint);
  }
  seen.results = (await (await client.files.content(job.result_files[0])).text()).split("\n")[0];
  seen.models = [];
  for await (const each of client.models.list()) seen.models.push(each.id);

  const messages = [{ role: "user", content: "one two three" }];
  const answer = await client.chat.completions.create({ model: job.fine_tuned_model, messages });
  seen.answer = [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens];
  seen.streamed = "";
  const pieces = await client.chat.completions.create({ model: job.fine_tuned_model, messages, stream: true });
  for await (const piece of pieces) seen.streamed += piece.choices[0]?.delta?.content ?? "";

  seen.refusals = [];
  const refused = async (wanted, act) => {
    try {
      await act();
    } catch (error) {
      seen.refusals.push([error.constructor === wanted, error.status, error.code, error.requestID !== undefined]);
    }
  };
  const create = (fields) => client.fineTuning.jobs.create({ model, training_file: file.id, ...fields });
  await refused(OpenAI.BadRequestError, () => create({ training_file: "file-nothing" }));
  await refused(OpenAI.NotFoundError, () => client.fineTuning.jobs.retrieve("ftjob-nothing"));
  await refused(OpenAI.AuthenticationError, () => new OpenAI({ apiKey: "sk-wrong" }).models.list());
  seen.deleted = (await client.models.delete(job.fine_tuned_model)).deleted;
  const { data, request_id } = await client.files.delete(file.id).withResponse();
  seen.fileDeleted = [data.deleted, request_id.startsWith("req_")];
  console.log(JSON.stringify(seen));
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
