// For the tests of app_bridge: an app that asks for the same things as the demo app, in our own words.
// It is read, never built.

import MLX
import MLXNN

final class Looking: Module {
    let width: Int
    @ModuleInfo(key: "k_proj") var keys: Linear
    @ModuleInfo(key: "v_proj") var values: Linear
    @ModuleInfo(key: "q_proj") var queries: Linear
    @ModuleInfo(key: "o_proj") var out: Linear
    @ModuleInfo var turning: RoPE

    init(text: Settings.Text) {
        width = text.channels / text.heads
        let wide = text.heads * width
        let narrow = text.keyHeads * width
        _queries.wrappedValue = Linear(text.channels, wide)
        _keys.wrappedValue = Linear(text.channels, narrow)
        _values.wrappedValue = Linear(text.channels, narrow)
        _out.wrappedValue = Linear(wide, text.channels, bias: false)
        guard let parts = text.turns?["mrope_section"], parts.asInts() != nil else {
            fatalError("no sections")
        }
        _turning.wrappedValue = RoPE(dimensions: width, traditional: text.pairwise, base: text.base)
    }
}

final class Thinking: Module {
    static let shifted = false
    @ModuleInfo(key: "down_proj") var home: Linear
    @ModuleInfo(key: "up_proj") var spread: Linear
    @ModuleInfo(key: "gate_proj") var door: Linear

    init(from outer: Int, to inner: Int) {
        _spread.wrappedValue = Linear(outer, inner, bias: Self.shifted)
        _home.wrappedValue = Linear(inner, outer, bias: Self.shifted)
        _door.wrappedValue = Linear(outer, inner, bias: Self.shifted)
    }
}

final class Step: Module {
    @ModuleInfo(key: "self_attn") var looking: Looking
    @ModuleInfo(key: "mlp") var thinking: Thinking
    @ModuleInfo(key: "input_layernorm") var before: RMSNorm
    @ModuleInfo(key: "post_attention_layernorm") var between: RMSNorm

    init(text: Settings.Text) {
        let channels = text.channels
        _looking.wrappedValue = Looking(text: text)
        _thinking.wrappedValue = Thinking(from: channels, to: text.inner)
        _before.wrappedValue = RMSNorm(dimensions: channels, eps: text.small)
        _between.wrappedValue = RMSNorm(dimensions: channels, eps: text.small)
    }
}

final class Stack: Module {
    let layers: [Step]
    let norm: RMSNorm
    @ModuleInfo(key: "embed_tokens") var words: Embedding

    init(text: Settings.Text) {
        layers = (0 ..< text.depth).map { _ in Step(text: text) }
        norm = RMSNorm(dimensions: text.channels, eps: text.small)
        _words.wrappedValue = Embedding(embeddingCount: text.words, dimensions: text.channels)
    }

    func callAsFunction(_ start: MLXArray, memory: [KVCache]?) -> MLXArray {
        var state = start
        let mask = createAttentionMask(h: state, cache: memory)
        for (index, layer) in layers.enumerated() {
            state = layer(state, mask: mask, memory: memory?[index])
        }
        return norm(state)
    }
}

final class Speaker: Module {
    @ModuleInfo(key: "model") var stack: Stack
    @ModuleInfo(key: "lm_head") var head: Linear?

    init(text: Settings.Text) {
        _stack.wrappedValue = Stack(text: text)
        if text.tied {
            // the embedding again
        } else {
            _head.wrappedValue = Linear(text.channels, text.words, bias: false)
        }
    }
}

final class Bridge: Module {
    @ModuleInfo(key: "linear_0") var first: Linear
    @ModuleInfo(key: "linear_2") var second: Linear
    let curve = GELU()

    init(settings: Settings) {
        let channels = settings.text.channels
        _first.wrappedValue = Linear(settings.picture.channels, channels)
        _second.wrappedValue = Linear(channels, channels, bias: true)
    }
}
