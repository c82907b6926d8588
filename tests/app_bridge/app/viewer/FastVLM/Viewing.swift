import CoreML
import MLX
import MLXLMCommon
import MLXVLM

final class Seeing {
    private var _model: fastvithd?

    func network() throws -> fastvithd {
        let made = try _model ?? fastvithd(configuration: MLModelConfiguration())
        _model = made
        return made
    }

    func features(of picture: MLXArray, height: NSNumber, width: NSNumber) throws -> MLXArray {
        let input = try MLMultiArray(shape: [1, 3, height, width], dataType: .float32)
        let answer = try network().prediction(images: input)
        guard answer.image_features.shape == [1, 256, 3072], answer.image_features.dataType == .float32 else {
            throw VLMError.imageProcessingFailure("\(answer.image_features.shape)")
        }
        return MLXArray(answer.image_features)
    }
}

struct Picturing {
    var imageToken = "<image>"
    var numAdditionalImageTokens = 0
    var patchSize = 64
}

final class Writer: UserInputProcessor {
    private let picturing = Picturing()
    private let scaling: Scaling
    private let tokenizer: any Tokenizer

    init(scaling: Scaling, tokenizer: any Tokenizer) {
        self.scaling = scaling
        self.tokenizer = tokenizer
    }

    func write(_ prompt: UserInput.Prompt, grid: THW) -> String {
        var said = prompt.asMessages()
        let told = ["role": "system", "content": "You are a helpful assistant."]
        if !said.contains(where: { $0["role"] == told["role"] }) { said = [told] + said }
        let side = picturing.patchSize
        let count = (grid.h / side) * (grid.w / side) + picturing.numAdditionalImageTokens
        said[said.count - 1]["content"]? += String(repeating: picturing.imageToken, count: count)
        return said.map { turn in
            "<|im_start|>\(turn["role", default: "user"])\n\(turn["content", default: ""])<|im_end|>"
        }.joined(separator: "\n") + "\n<|im_start|>assistant\n"
    }

    func prepare(input: UserInput) throws -> LMInput {
        let picture = LMInput.ProcessedImage(pixels: pixels(of: input), imageGridThw: [grid(of: input)])
        return LMInput(text: tokens(of: input), image: picture)
    }
}

final class Viewer: Module, VLMModel {
    @ModuleInfo(key: "multi_modal_projector") var bridge: Bridge
    @ModuleInfo(key: "language_model") var speaker: Speaker
    let seeing = Seeing()

    init(settings: Settings) {
        _bridge.wrappedValue = Bridge(settings: settings)
        _speaker.wrappedValue = Speaker(text: settings.text)
    }

    func sanitize(weights: [String: MLXArray]) -> [String: MLXArray] { weights }

    func loraLinearLayers() -> LoRALinearLayers {
        speaker.stack.layers.map { ($0.looking, ["q_proj"]) }
    }

    static var folder: ModelConfiguration {
        let found = Bundle(for: Viewer.self).url(forResource: "config", withExtension: "json")!
        return ModelConfiguration(directory: found.deletingLastPathComponent())
    }

    static func enrol(in factory: VLMModelFactory) {
        factory.processorRegistry.registerProcessorType("LlavaProcessor") { file, tokenizer in
            let scaling = try JSONDecoder().decode(Scaling.self, from: Data(contentsOf: file))
            return Writer(scaling: scaling, tokenizer: tokenizer)
        }
        factory.typeRegistry.registerModelType("llava_qwen2") { file in
            let settings = try JSONDecoder().decode(Settings.self, from: Data(contentsOf: file))
            return Viewer(settings: settings)
        }
    }
}
