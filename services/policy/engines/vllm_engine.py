"""vLLM as the engine: its `AsyncLLM` on an event loop of its own, in the engine's thread.

    submit  -> one vLLM request a sample -> events as the samples finish
    weights -> merged and written to a file -> pause -> weight transfer, caches cleared -> resume

Every sample is a request of its own, so that it has its own seed, ends at its own time and tells its own weights;
what the samples of a prompt share comes out of vLLM's prefix cache. The loop here only hands events over: vLLM
computes in processes of its own.

A pause keeps the running samples: they go on with the new weights, and vLLM computes their keys and values again.
Adapters (`lora`) need no pause: every version is an adapter with a name of its own. It serves the samples that come
later; those that run end with the adapter they began with.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoConfig, PreTrainedConfig

from services.policy.engines.hardware import Precision
from services.policy.engines.sampling import end_tokens
from services.policy.engines.vllm_choice import accepted_context, vllm_verdict
from services.policy.engines.vllm_samples import Request, Sample
from services.policy.engines.vllm_settings import VllmSettings
from services.policy.engines.vllm_start import engine_arguments, generation_config, set_environment
from services.policy.engines.vllm_weights import Checkpoint, Plan, save_adapter
from steersman.errors import (
    ConfigError,
    InternalError,
    InvalidArgumentError,
    SteersmanError,
    UnavailableError,
)
from steersman.generation import (
    EngineInfo,
    Event,
    GenerationRequest,
    WeightsUpdate,
)
from steersman.loop_thread import LoopThread
from steersman.nn.load import context_of
from steersman.nn.parity import ParityVerdict

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

LOGPROBS_NOTE = (
    "float32 natural logarithm of the distribution that was sampled from: after temperature, top-k, top-p, minimum "
    "length and token constraints (temperature 0: of the untempered distribution)"
)
_NOT_OPEN = "the engine is closed; start it before loading weights"
_T = TypeVar("_T")


class VllmEngine:
    """See `services.policy.engine.Engine`.

    The random numbers of a sample do not depend on its neighbours; its logits do in the last bits, because kernels
    round by batch size.
    """

    def __init__(
        self,
        model: Path,
        options: VllmSettings = VllmSettings(),
        *,
        name: str = "policy",
        precision: Precision = "auto",
        device: str = "auto",
        threads: int = 0,
        max_context: int | None = None,
        kv_cache_tokens: int = 16_384,
        on_death: Callable[[], None] = lambda: None,
        small: bool = False,
    ) -> None:
        """
        Args:
            model: folder of a causal language model, in safetensors.
            name: what `info` reports.
            precision: "auto" takes the checkpoint's.
            device: "auto", "cpu" or "cuda"; it must be that of the installed vLLM.
            threads: CPU threads; 0: all cores. Without meaning on a GPU.
            max_context: longest prompt plus response in tokens; None: the model's. It is at most `kv_cache_tokens`.
            kv_cache_tokens: tokens that the cache holds for all running samples; it bounds the memory.
            on_death: called once from the engine's thread when vLLM's processes have died, or the thread itself ends
                without `close`: the engine is of no use any more.
            small: the model is one with which another's architecture is checked; its folder has no tokenizer.
        """
        self._model = model
        self._name = name
        self._precision = precision
        self._device = device
        self._threads = threads
        self._max_context = max_context
        self._kv_cache_tokens = kv_cache_tokens
        self._options = options
        self._on_death: Callable[[], None] | None = on_death
        self._small_model = small
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._loop: LoopThread | None = None
        self._requests: dict[int, Request] = {}
        self._next_handle = 0
        self._version = 0
        self._adapter: LoRARequest | None = None
        self._adapter_users: Counter[int] = Counter()

    def verdict(self) -> ParityVerdict:
        """Whether vLLM computes the model's architecture as transformers does; the model itself is not loaded."""
        self._find_device()
        config = AutoConfig.from_pretrained(self._model)
        return vllm_verdict(config, self._small, exact=self._precision == "fp32")

    def _find_device(self) -> None:
        set_environment(self._threads)
        from vllm.platforms import current_platform

        found = "cpu" if current_platform.is_cpu() else "cuda"
        if self._device not in ("auto", found):
            raise ConfigError(
                f"device is {self._device}, the installed vLLM computes on {found}; install the other one"
            )
        self._device = found
        if self._options.lora == "auto":
            self._options = self._options.model_copy(update={"lora": "merge" if found == "cpu" else "adapter"})

    def start(self) -> None:
        self._find_device()
        whole = AutoConfig.from_pretrained(self._model)
        config = whole.get_text_config()
        self._vocab: int = config.vocab_size
        limits = [context_of(config), self._kv_cache_tokens, self._max_context]
        if self._options.check_architecture and not self._small_model:
            limits.append(accepted_context(whole, self._small, exact=self._precision == "fp32"))
        self._context: int = min(limit for limit in limits if limit)
        self._eos = end_tokens(generation_config(self._model), config)
        self._scratch = Path(tempfile.mkdtemp(prefix="vllm-weights-"))
        loop = LoopThread("vllm-engine", self._ended)
        try:
            self._llm, self._load = loop.run(self._start(config))
        except Exception as error:
            self._stop(loop)
            raise ConfigError(f"vLLM cannot serve '{self._model}': {error}") from error
        self._dtype: torch.dtype = self._llm.model_config.dtype
        self._checkpoint = Checkpoint(self._model, self._scratch, self._dtype, tied=config.tie_word_embeddings)
        with self._lock:
            self._loop = loop

    def _small(self, folder: Path, context: int | None) -> VllmEngine:
        """An engine like this one for a small model."""
        options = VllmSettings(max_running=16, memory_share=self._options.memory_share, eager=True, lora="merge")
        return VllmEngine(
            folder,
            options,
            precision="fp32" if self._precision == "fp32" else "bf16",
            device=self._device,
            threads=self._threads,
            max_context=context,
            kv_cache_tokens=2048,
            small=True,
        )

    async def _start(self, config: PreTrainedConfig) -> tuple[AsyncLLM, Any]:
        from vllm.v1.engine.async_llm import AsyncLLM

        from services.policy.engines.vllm_load import Load

        load = Load()
        arguments = engine_arguments(
            self._model,
            config,
            self._options,
            cpu=self._device == "cpu",
            precision=self._precision,
            context=self._context,
            kv_cache_tokens=self._kv_cache_tokens,
            small=self._small_model,
        )
        llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[load.logger])
        await llm.get_supported_tasks()  # kept from now on: adding a request does not wait for it
        await llm.update_weight_version("0")
        return llm, load

    def _stop(self, loop: LoopThread) -> None:
        loop.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def close(self) -> None:
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            with suppress(UnavailableError):  # its thread has died, and told everybody
                loop.run(self._end_all())
            self._stop(loop)

    async def _end_all(self) -> None:
        error = UnavailableError("the engine was closed before the request ended; send it again")
        for one in list(self._requests.values()):
            tasks = list(one.tasks)
            one.fail(error)
            await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown()

    def info(self) -> EngineInfo:
        unfinished = sum(len(one.running) for one in list(self._requests.values()))
        waiting = min(max(self._load.waiting, unfinished - self._options.max_running, 0), unfinished)
        return EngineInfo(
            engine="vllm",
            model=self._name,
            vocab_size=self._vocab,
            max_context=self._context,
            eos_token_ids=tuple(sorted(self._eos)),
            dtype=str(self._dtype).removeprefix("torch."),
            device=self._device,
            weights_version=self._version,
            running=unfinished - waiting,
            waiting=waiting,
            logprobs_note=LOGPROBS_NOTE,
            details=self._load.details,
        )

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        request.check(self._vocab, self._context)
        if request.params.mask_top_p < 1.0:
            raise InvalidArgumentError(
                "the vllm engine has no mask policy (sampling.mask_top_p); use the transformers engine"
            )
        if request.constraint is not None and getattr(request.constraint, "json_schema", None) is None:
            raise InvalidArgumentError(
                "the vllm engine knows only constraints by JSON schema; use the transformers engine for others"
            )
        with self._lock:
            if self._loop is None:
                raise UnavailableError("the engine is closed; send the request to another replica")
            self._next_handle += 1
            one = Request(request, on_event, self._next_handle)
            self._loop.begin(self._begin(one), lambda error: one.fail(_translate(error)))
        return one.handle

    def cancel(self, handle: int) -> None:
        with self._lock, suppress(UnavailableError):  # the thread has died, and every request with it
            if self._loop is not None:
                self._loop.begin(self._cancel(handle))

    def load_weights(self, update: WeightsUpdate) -> float:
        if update.split()[1] is not None:
            raise InvalidArgumentError("the vllm engine has no mask policy; train NLPO against the transformers engine")
        with self._loading:
            with self._lock:
                if self._loop is None:  # the folder for the weights is gone
                    raise UnavailableError(_NOT_OPEN)
            if update.kind == "lora" and self._options.lora == "adapter":
                return self._load_adapter(update)
            return self._wait_for_swap(self._checkpoint.after(update), update.version, None)

    def _load_adapter(self, update: WeightsUpdate) -> float:
        """An adapter lies on the weights of the start: these come back first when others are in place."""
        from vllm.lora.request import LoRARequest

        folder = self._scratch / f"adapter-{update.version}"
        save_adapter(folder, update)
        adapter = LoRARequest(f"version-{update.version}", update.version, str(folder))
        if self._checkpoint.now is not self._checkpoint.start:
            return self._wait_for_swap(self._checkpoint.start, update.version, adapter)
        return self._wait(self._use_adapter(adapter, update.version))

    def _wait_for_swap(self, plan: Plan, version: int, adapter: LoRARequest | None) -> float:
        try:
            return self._wait(self._swap(plan, version, adapter))
        finally:
            self._checkpoint.discard()

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Runs a coroutine on the engine's thread."""
        loop = self._loop
        if loop is None:
            work.close()
            raise UnavailableError(_NOT_OPEN)
        try:
            return loop.run(work)
        except Exception as error:
            raise _translate(error) from error

    # On the event loop.

    async def _swap(self, plan: Plan, version: int, adapter: LoRARequest | None) -> float:
        """Full weights for every sample, running ones included; samples with an adapter end before."""
        await self._llm.pause_generation(mode="wait" if self._adapter_users.total() else "keep", clear_cache=True)
        start = perf_counter()
        try:
            try:
                await self._transfer(plan)
            except Exception:
                await self._transfer(self._checkpoint.now)
                raise
            self._checkpoint.commit(plan)
            await self._llm.update_weight_version(str(version))
            self._version = version
            await self._use_adapter(adapter, version)
        finally:
            await self._llm.resume_generation()
        return perf_counter() - start

    async def _transfer(self, plan: Plan) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.start_weight_update()
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"files": plan.files()}))
        await self._llm.finish_weight_update()

    async def _use_adapter(self, adapter: LoRARequest | None, version: int) -> float:
        start = perf_counter()
        if adapter is not None:
            try:
                await self._llm.add_lora(adapter)
            except Exception as error:
                shutil.rmtree(adapter.lora_path, ignore_errors=True)
                raise InvalidArgumentError(
                    f"vLLM cannot use the adapter ({error}); send full weights or set lora: merge"
                ) from error
        before, self._adapter, self._version = self._adapter, adapter, version
        if before is not None:
            await self._forget_adapter(before)
        return perf_counter() - start

    async def _forget_adapter(self, adapter: LoRARequest) -> None:
        """Frees an adapter that is not in use any more, once no running sample needs it."""
        if self._adapter_users[adapter.lora_int_id]:
            return
        del self._adapter_users[adapter.lora_int_id]
        try:
            await self._llm.remove_lora(adapter.lora_int_id)
        except Exception:
            logger.exception("vLLM keeps the adapter %s, which nobody needs", adapter.lora_name)
        shutil.rmtree(adapter.lora_path, ignore_errors=True)

    async def _begin(self, one: Request) -> None:
        self._requests[one.handle] = one
        one.adapter = self._adapter
        if one.adapter is not None:
            self._adapter_users[one.adapter.lora_int_id] += 1
        for prompt_index in range(len(one.request.prompts)):
            for sample_index in range(one.request.n):
                vllm_id = f"{one.handle}-{prompt_index}-{sample_index}"
                one.running.add(vllm_id)
                one.begin(self._sample(one, vllm_id, prompt_index, sample_index))

    async def _end(self, one: Request) -> None:
        del self._requests[one.handle]
        if one.adapter is not None:
            self._adapter_users[one.adapter.lora_int_id] -= 1
            if one.adapter is not self._adapter:
                await self._forget_adapter(one.adapter)

    async def _cancel(self, handle: int) -> None:
        one = self._requests.get(handle)
        if one is not None:
            one.cancelled = True
            await self._llm.abort(list(one.running))

    async def _sample(self, one: Request, vllm_id: str, prompt_index: int, sample_index: int) -> None:
        sample = Sample(one, prompt_index, sample_index)
        try:
            if not one.cancelled:
                await self._generate(one, vllm_id, sample)
            one.running.discard(vllm_id)
            if not one.ended:
                one.deliver(sample.finished())
        except Exception as error:
            if self._llm.errored:
                self._died("vLLM's processes have died; their log above tells why")
            one.fail(_translate(error))
        finally:
            one.running.discard(vllm_id)
            if not one.running:
                await self._end(one)

    async def _generate(self, one: Request, vllm_id: str, sample: Sample) -> None:
        from vllm.inputs.engine import tokens_input

        prompt = one.request.prompts[sample.prompt_index]
        limit = min(one.request.params.max_new_tokens, self._context - len(prompt))
        params = sample.params(limit, self._eos)
        outputs = self._llm.generate(tokens_input(prompt.tolist()), params, vllm_id, lora_request=one.adapter)
        async with aclosing(outputs) as results:
            async for result in results:
                if result.prompt_logprobs:
                    sample.add_prompt(result.prompt_logprobs)
                sample.add(result.outputs[0], self._version)

    def _ended(self, cause: BaseException | None) -> None:
        """The loop's thread ends; `close` has told every request."""
        if cause is None:
            return
        error = UnavailableError(f"the engine has stopped ({cause!r}); send the request to another replica")
        for one in list(self._requests.values()):
            one.fail(error)
        self._died(error.message)

    def _died(self, why: str) -> None:
        told, self._on_death = self._on_death, None
        if told is not None:
            logger.critical(why)
            told()


def _translate(error: Exception) -> SteersmanError:
    if isinstance(error, SteersmanError):
        return error
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, (VLLMClientError, ValueError)):
        return InvalidArgumentError(f"vLLM refused the request: {error}")
    if isinstance(error, EngineDeadError):
        return UnavailableError("vLLM's processes have died; send the request to another replica")
    logger.error("vLLM failed", exc_info=error)
    return InternalError(f"vLLM failed: {error}")
