import CoreGraphics
import Foundation

struct Settings: Codable {
    let text: Text
    let common: Common
    let picture: Picture

    init(from decoder: Decoder) throws {
        text = try Text(from: decoder)
        common = try Common(from: decoder)
        picture = try Picture(from: decoder)
    }
}

extension Settings {
    struct Picture: Codable {
        let channels: Int

        enum CodingKeys: String, CodingKey { case channels = "mm_hidden_size" }
    }

    struct Common: Codable {
        let model_type: String
        let image_token_index: Int
        let vocab_size, hidden_size: Int
    }

    struct Text: Codable {
        enum CodingKeys: String, CodingKey {
            case kind = "model_type", words = "vocab_size", channels = "hidden_size"
            case inner = "intermediate_size"
            case depth = "num_hidden_layers"
            case heads = "num_attention_heads", keyHeads = "num_key_value_heads"
            case given = "rms_norm_eps"
            case longest = "max_position_embeddings"
            case givenBase = "rope_theta"
            case givenPairwise = "rope_traditional"
            case givenTurns = "rope_scaling"
            case givenTied = "tie_word_embeddings"
        }

        let kind: String
        let words: Int
        let channels: Int
        let inner: Int
        let depth: Int
        let heads: Int
        let keyHeads: Int
        private let given: Float?
        private let longest: Int?
        private let givenBase: Float?
        private let givenPairwise: Bool?
        private let givenTurns: [String: StringOrNumber]?
        private let givenTied: Bool?

        var small: Float { given ?? 0.000_001 }
        var most: Int { return longest ?? 1 << 15 }
        var base: Float { givenBase ?? 1e6 }
        var pairwise: Bool { givenPairwise ?? false }
        var turns: [String: StringOrNumber]? { givenTurns ?? ["mrope_section": .ints([2, 1, 1])] }
        var tied: Bool { givenTied ?? true }
    }
}

struct Scaling: Codable {
    struct Shortest: Codable {
        let edge: Int

        enum CodingKeys: String, CodingKey { case edge = "shortest_edge" }
    }

    struct Crop: Codable {
        let width: Int
        let height: Int
    }

    let size: Shortest
    let crop: Crop
    let mean, deviation: [CGFloat]

    enum CodingKeys: String, CodingKey {
        case size
        case crop = "crop_size"
        case mean = "image_mean"
        case deviation = "image_std"
    }
}
