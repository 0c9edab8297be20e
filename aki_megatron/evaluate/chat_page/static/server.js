// Requests to this page's own server. Every failure is a PageError whose message is for the user.

export class PageError extends Error {}

const GONE = "The server does not answer. Start it again with the command that opened this page, then ask once more.";
const BROKEN = "The connection to the server broke before the answer was complete. Ask again.";

/** The server's key, if it has one: written behind the address of the page (#key=...), which is never sent. */
const key = new URLSearchParams(location.hash.slice(1)).get("key");

async function request(path, { body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined
    ? { headers, signal }
    : { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new PageError(GONE);
  }
  if (!response.ok) throw new PageError(await refusal(response));
  return response;
}

async function refusal(response) {
  if (response.status === 401) {
    return "This server wants a key. Open the page with the whole address that the server printed; it ends in #key=...";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server refused the request with status ${response.status}.`;
  }
}

async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw error.name === "AbortError" ? error : new PageError(BROKEN);
  }
}

/** What the server shows: models, limits, examples (chat_page/setup.py). */
export const loadSetup = () => json("/page/setup");

/** What the last picture of the messages attends to (chat_page/inspection.py). */
export const inspect = (model, messages, signal) => json("/inspect", { body: { model, messages }, signal });

/** Ask a model; `onText` gets every piece of the answer. Returns why it ended: stop or length. */
export async function streamAnswer(model, messages, { signal, onText }) {
  const response = await request("/v1/chat/completions", { body: { model, messages, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "", reason = null;
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : new PageError(BROKEN);
    }
    if (part.done) throw new PageError(BROKEN);
    const lines = (buffered + part.value).split("\n");
    buffered = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return reason;
      const event = JSON.parse(data);
      if (event.error) throw new PageError(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content) onText(choice.delta.content);
      reason = choice?.finish_reason ?? reason;
    }
  }
}
