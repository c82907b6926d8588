import CoreML
import MLX
import MLXLMCommon
import MLXVLM

final class Seeing {
    static let tokens = 256
    private let network = try! fastvithd(configuration: MLModelConfiguration())

    func features(of picture: MLXArray, height: NSNumber, width: NSNumber) throws -> MLXArray {
        let input = try MLMultiArray(shape: [1, 3, height, width], dataType: .float32)
        let answer = try network.prediction(images: input)
        let features = answer.image_features
        guard features.shape == [1, Seeing.tokens, 3072], features.dataType == .float32 else {
            throw VLMError.imageProcessingFailure("\(features.shape)")
        }
        return MLXArray(features)
    }
}

enum Marks {
    static let begin = "<|im_start|>", end = "<|im_end|>"
    static let between = "\n"
    static let reply = "\n<|im_start|>assistant\n"
}

struct Picturing {
    var placeholder = "<image>"
    var patch = 64
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
        let told = ["content": "You are a helpful assistant.", "role": "system"]
        if !said.contains(where: { $0["role"] == told["role"] }) { said = [told] + said }
        let side = picturing.patch
        let count = (grid.h / side) * (grid.w / side)
        said[said.count - 1]["content"]? += String(repeating: picturing.placeholder, count: count)
        let turns = said.map { turn -> String in
            let who = turn["role", default: "user"], what = turn["content", default: ""]
            return "\(Marks.begin)\(who)\n\(what)\(Marks.end)"
        }
        return turns.joined(separator: Marks.between) + Marks.reply
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
            Viewer(settings: try JSONDecoder().decode(Settings.self, from: Data(contentsOf: file)))
        }
    }
}
