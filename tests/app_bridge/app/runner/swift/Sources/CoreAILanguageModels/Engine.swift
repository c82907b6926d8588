// An engine of our own that asks for the same of a bundle as Apple's, to test what reads its facts.
import Foundation

struct Folder {
    let title: String

    init(raw: Data) throws {
        let version = try Head(raw).version ?? "0.1"
        guard version == "0.2" else { throw Wrong.version(version) }
        guard try Head(raw).kind == .vlm else { throw Wrong.kind }
        title = try Head(raw).name
    }
}

struct Head: Decodable {
    let name: String
    let notes: [String: String]?

    enum CodingKeys: String, CodingKey {
        case name
        case notes = "user_data"
    }
}

enum Fitting: String, Codable {
    case stretch
    case crop = "center_crop"
    case pad
}

struct Talk: Decodable {
    let names: String
    let words: Int
    let longest: Int
    let within: Bool
    let roles: FunctionMap?
    let pictures: VisionConfig?
    let memory: [String: StateKind]?

    enum CodingKeys: String, CodingKey {
        case names = "tokenizer"
        case words = "vocab_size"
        case longest = "max_context_length"
        case within = "embedded_tokenizer"
        case roles = "function_map"
        case pictures = "vision"
        case memory = "states"
    }

    init(from decoder: Swift.Decoder) throws {
        let box = try decoder.container(keyedBy: CodingKeys.self)
        names = try box.decode(String.self, forKey: .names)
        words = try box.decode(Int.self, forKey: .words)
        longest = try box.decode(Int.self, forKey: .longest)
        within = try box.decodeIfPresent(Bool.self, forKey: .within) ?? true
        roles = try box.decodeIfPresent(FunctionMap.self, forKey: .roles)
        pictures = try box.decodeIfPresent(VisionConfig.self, forKey: .pictures)
        memory = try box.decodeIfPresent([String: StateKind].self, forKey: .memory)
    }
}

struct Sight: Decodable {
    static let grey = [0.48145466, 0.4578275, 0.40821073]
    static let spread = [0.26862954, 0.26130258, 0.27577711]

    let side: Int
    let patch: Int
    let count: Int
    let place: Int32
    let mean: [Double]
    let deviation: [Double]
    let factor: Double
    let fitting: ImageStrategy
    let told: Bool
    let frames: Int?
    let each: Int?

    enum CodingKeys: String, CodingKey {
        case side = "image_size"
        case patch = "patch_size"
        case count = "image_token_count"
        case place = "image_token_id"
        case mean = "image_mean"
        case deviation = "image_std"
        case factor = "rescale_factor"
        case fitting = "image_strategy"
        case told = "include_image_info"
        case frames = "max_video_frames"
        case each = "tokens_per_frame"
    }

    init(from decoder: Swift.Decoder) throws {
        let box = try decoder.container(keyedBy: CodingKeys.self)
        side = try box.decode(Int.self, forKey: .side)
        patch = try box.decode(Int.self, forKey: .patch)
        count = try box.decode(Int.self, forKey: .count)
        place = try box.decode(Int32.self, forKey: .place)
        mean = try box.decodeIfPresent([Double].self, forKey: .mean) ?? Self.grey
        deviation = try box.decodeIfPresent([Double].self, forKey: .deviation) ?? Self.spread
        factor = try box.decodeIfPresent(Double.self, forKey: .factor) ?? 1.0
        fitting = try box.decodeIfPresent(ImageStrategy.self, forKey: .fitting) ?? .stretch
        told = try box.decodeIfPresent(Bool.self, forKey: .told) ?? false
        frames = try box.decodeIfPresent(Int.self, forKey: .frames)
        each = try box.decodeIfPresent(Int.self, forKey: .each)
    }
}

typealias ImageStrategy = Fitting

final class Speaker {
    let limit: Int

    init(limit: Int, program: Description) throws {
        guard program.inputNames.count == 2 else { throw Wrong.inputs }
        guard program.stateNames.count == 2 else { throw Wrong.states }
        self.limit = min(256, limit)
    }

    func stops(_ words: any Tokenizer) -> Int? {
        words.convertTokenToId("<|im_end|>")
    }

    func mark(_ words: any Tokenizer, _ id: Int) -> String {
        words.convertIdToToken(id) ?? "<|image_pad|>"
    }

    func most(_ options: Options) -> Int {
        options.maximumResponseTokens ?? 512
    }
}
